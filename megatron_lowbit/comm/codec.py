"""Codec: values to packets and back, for one wire format at one sync point. Knows senders' scales, not groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowbit_kernels import Backend
from megatron_lowbit.comm.saturation import SaturationCounter, saturation_limits
from megatron_lowbit.comm.wire_format import WireFormat

# Shapes: T tokens, H hidden features, D body features, K outliers, R ranks, B bytes of a packet row.


class Codec:
    """Encodes rows of partial sums and decodes packets.

    scale_RD: FP32, one row of static scales for each sender (one row for the gather stage, whose values all owners
    encode alike); None for formats that carry their scales or need none. saturation: counts what is encoded, if given.
    """

    def __init__(
        self,
        wire_format: WireFormat,
        hidden: int,
        backend: Backend,
        body_index: torch.Tensor | None = None,
        outlier_index: torch.Tensor | None = None,
        scale_RD: torch.Tensor | None = None,
        saturation: SaturationCounter | None = None,
    ) -> None:
        self.layout = wire_format.packet_layout(hidden)
        assert (scale_RD is not None) == wire_format.is_static, wire_format
        self._backend = backend
        self._body_index = body_index if self.layout.outliers else None
        self._outlier_index = outlier_index if self.layout.outliers else None
        self._scale_RD = scale_RD
        # stored once in FP32: encoding is a multiplication, so that every implementation rounds alike
        self._inverse_scale_RD = None if scale_RD is None else 1.0 / scale_RD
        self._saturation = saturation
        self._limit_RH: torch.Tensor | None = None
        if saturation is not None and scale_RD is not None:
            largest = 2 ** (wire_format.bits - 1) - 1
            self._limit_RH = saturation_limits(scale_RD, self._body_index, hidden, largest)

    def encode(self, x_TH: torch.Tensor, sender: int, packet_TB: torch.Tensor | None = None) -> torch.Tensor:
        """Packet `[T, B]` uint8 of bf16 or fp32 values; written into `packet_TB` where one is given."""
        if packet_TB is None:
            packet_TB = torch.empty(x_TH.shape[0], self.layout.row_nbytes, dtype=torch.uint8, device=x_TH.device)
        if self._saturation is not None:
            self._saturation.count(x_TH, None if self._limit_RH is None else self._limit_RH[sender])
        inverse = None if self._inverse_scale_RD is None else self._inverse_scale_RD[sender]
        self._backend.encode(x_TH, self.layout, packet_TB, inverse, self._body_index, self._outlier_index)
        return packet_TB

    def decode(self, packet_TB: torch.Tensor, sender: int) -> torch.Tensor:
        """FP32 values `[T, H]` of one sender's packet."""
        out_TH = torch.empty(packet_TB.shape[0], self.layout.features, device=packet_TB.device)
        scale = None if self._scale_RD is None else self._scale_RD[sender]
        self._backend.decode(packet_TB, self.layout, out_TH, scale, self._body_index, self._outlier_index)
        return out_TH

    def decode_sum(self, packets_RTB: Sequence[torch.Tensor] | torch.Tensor) -> torch.Tensor:
        """FP32 sum `[T, H]` of one packet from each rank, each with its sender's scales, added in rank order."""
        first = packets_RTB[0]
        out_TH = torch.empty(first.shape[0], self.layout.features, device=first.device)
        self._backend.decode_sum(
            packets_RTB, self.layout, out_TH, self._scale_RD, self._body_index, self._outlier_index
        )
        return out_TH
