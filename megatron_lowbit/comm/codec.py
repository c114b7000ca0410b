"""Codec: values to packets and back, for one wire format at one sync point. Knows senders' scales, not groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowbit_kernels import Backend, PacketLayout
from lowbit_kernels.foretell import Share, get_feedback, unsent
from megatron_lowbit.comm.saturation import SaturationCounter, saturation_limits
from megatron_lowbit.comm.wire_format import WireFormat

# Shapes: T tokens, H hidden features, D body features, K outliers, R ranks, B bytes of a packet row.


class Codec:
    """Encodes rows of partial sums and decodes packets.

    rotates: where true (`RotatedCodec`), packets are not of rows as they come, and no kernel goes right to them.

    scale_RD, minimum_RD: FP32, one row of static constants for each sender (one row for the gather stage, whose values
    all owners encode alike); None for formats that have no use for them. saturation: counts what is encoded, if given.
    """

    rotates = False

    def __init__(
        self,
        wire_format: WireFormat,
        hidden: int,
        backend: Backend,
        body_index: torch.Tensor | None = None,
        outlier_index: torch.Tensor | None = None,
        scale_RD: torch.Tensor | None = None,
        saturation: SaturationCounter | None = None,
        minimum_RD: torch.Tensor | None = None,
    ) -> None:
        self.layout = wire_format.packet_layout(hidden)
        assert (scale_RD is not None) == self.layout.needs_static, wire_format
        assert (minimum_RD is not None) == self.layout.needs_minimum, wire_format
        self._backend = backend
        self.feedback = get_feedback(backend)
        self._body_index = body_index if self.layout.outliers else None
        self._outlier_index = outlier_index if self.layout.outliers else None
        self._scale_RD = scale_RD
        self._minimum_RD = minimum_RD
        # stored once in FP32: encoding is a multiplication, so that every implementation rounds alike
        self._inverse_scale_RD = None if scale_RD is None else 1.0 / scale_RD
        self._saturation = saturation
        self._limit_RH: torch.Tensor | None = None
        if saturation is not None and scale_RD is not None and not self.layout.group_size and minimum_RD is None:
            self._limit_RH = saturation_limits(scale_RD, self._body_index, hidden, _saturating_steps(self.layout))

    def encode(self, x_TH: torch.Tensor, sender: int, packet_TB: torch.Tensor | None = None) -> torch.Tensor:
        """Packet `[T, B]` uint8 of bf16 or fp32 values; written into `packet_TB` where one is given."""
        if packet_TB is None:
            packet_TB = torch.empty(x_TH.shape[0], self.layout.row_nbytes, dtype=torch.uint8, device=x_TH.device)
        if self._saturation is not None:
            self._saturation.count(x_TH, None if self._limit_RH is None else self._limit_RH[sender])
        self._backend.encode(
            x_TH,
            self.layout,
            packet_TB,
            _row(self._inverse_scale_RD, sender),
            self._body_index,
            self._outlier_index,
            _row(self._minimum_RD, sender),
        )
        return packet_TB

    def decode(
        self, packet_TB: torch.Tensor, sender: int, out_TH: torch.Tensor | None = None, add: bool = False
    ) -> torch.Tensor:
        """FP32 values `[T, H]` of one sender's packet; written into `out_TH` where one is given, or added to it."""
        if out_TH is None:
            out_TH = torch.empty(packet_TB.shape[0], self.layout.features, device=packet_TB.device)
        self._backend.decode(
            packet_TB,
            self.layout,
            out_TH,
            _row(self._scale_RD, sender),
            self._body_index,
            self._outlier_index,
            _row(self._minimum_RD, sender),
            add,
        )
        return out_TH

    def decode_sum(
        self, packets_RTB: Sequence[torch.Tensor] | torch.Tensor, out_TH: torch.Tensor | None = None
    ) -> torch.Tensor:
        """FP32 sum `[T, H]` of one packet from each rank, each with its sender's scales, added in rank order."""
        first = packets_RTB[0]
        if out_TH is None:
            out_TH = torch.empty(first.shape[0], self.layout.features, device=first.device)
        self._backend.decode_sum(
            packets_RTB,
            self.layout,
            out_TH,
            self._scale_RD,
            self._body_index,
            self._outlier_index,
            self._minimum_RD,
        )
        return out_TH

    def requantize(self, packets_RTB: Sequence[torch.Tensor], gather: Codec, packet_TB: torch.Tensor) -> None:
        """The packet of the sum of one packet from each rank: `decode_sum`, then `gather.encode`, in one pass."""
        if gather.rotates or gather._saturation is not None:  # it wants to see the sums
            requantize_in_steps(self, packets_RTB, gather, packet_TB)
            return
        self._backend.requantize(
            packets_RTB,
            self.layout,
            packet_TB,
            gather.layout,
            self._scale_RD,
            self._body_index,
            self._outlier_index,
            self._minimum_RD,
            gather_inverse_scale=_row(gather._inverse_scale_RD, 0),
            gather_body_index=gather._body_index,
            gather_outlier_index=gather._outlier_index,
            gather_minimum=_row(gather._minimum_RD, 0),
        )

    def encode_feedback(
        self,
        x_TH: torch.Tensor,
        sender: int,
        packet_TB: torch.Tensor,
        share: Share | None,
        missed_TH: torch.Tensor | None,
    ) -> None:
        """The packet of `x - share + missed`, of what is given; `missed_TH` becomes what the packet misses of that."""
        if share is None and missed_TH is None:
            self.encode(x_TH, sender, packet_TB)
            return
        if self._saturation is not None:
            limit_H = None if self._limit_RH is None else self._limit_RH[sender]
            self._saturation.count(unsent(x_TH, share, missed_TH), limit_H)
        self.feedback.encode_feedback(
            x_TH,
            self.layout,
            packet_TB,
            share,
            missed_TH,
            _row(self._inverse_scale_RD, sender),
            _row(self._scale_RD, sender),
            self._body_index,
            self._outlier_index,
            _row(self._minimum_RD, sender),
        )

    def requantize_feedback(
        self, packets_RTB: Sequence[torch.Tensor], gather: Codec, packet_TB: torch.Tensor, owed_TH: torch.Tensor | None
    ) -> None:
        """`requantize` of the sum plus `owed_TH`, which becomes what the packet misses of that; without, as it is."""
        if owed_TH is None:
            self.requantize(packets_RTB, gather, packet_TB)
            return
        if gather.rotates:
            requantize_in_steps(self, packets_RTB, gather, packet_TB, owed_TH)
            return
        if gather._saturation is not None:
            limit_H = None if gather._limit_RH is None else gather._limit_RH[0]
            gather._saturation.count(self.decode_sum(packets_RTB).add_(owed_TH), limit_H)
        self.feedback.requantize_feedback(
            packets_RTB,
            self.layout,
            packet_TB,
            gather.layout,
            owed_TH,
            self._scale_RD,
            self._body_index,
            self._outlier_index,
            self._minimum_RD,
            gather_inverse_scale=_row(gather._inverse_scale_RD, 0),
            gather_scale=_row(gather._scale_RD, 0),
            gather_body_index=gather._body_index,
            gather_outlier_index=gather._outlier_index,
            gather_minimum=_row(gather._minimum_RD, 0),
        )

    def decode_foretold(self, packet_TB: torch.Tensor, sender: int, out_TH: torch.Tensor, share: Share | None) -> None:
        """Adds a packet's values to FP32 `out_TH`, then what was foretold, where it is given."""
        if share is None:
            self.decode(packet_TB, sender, out_TH, add=True)
            return
        self.feedback.decode_foretold(
            packet_TB,
            self.layout,
            out_TH,
            share,
            _row(self._scale_RD, sender),
            self._body_index,
            self._outlier_index,
            _row(self._minimum_RD, sender),
        )


def requantize_in_steps(
    codec: Codec,
    packets_RTB: Sequence[torch.Tensor],
    gather: Codec,
    packet_TB: torch.Tensor,
    owed_TH: torch.Tensor | None = None,
) -> None:
    """`requantize_feedback` by way of the FP32 sum: what it means, for codecs that share no kernel."""
    sum_TH = codec.decode_sum(packets_RTB)
    if owed_TH is not None:
        sum_TH += owed_TH
    gather.encode(sum_TH, sender=0, packet_TB=packet_TB)
    if owed_TH is not None:
        torch.sub(sum_TH, gather.decode(packet_TB, sender=0), out=owed_TH)


def _saturating_steps(layout: PacketLayout) -> float:
    """Steps of a static scale from which a magnitude rounds beyond the largest code."""
    if layout.values == "int":
        return 2 ** (layout.bits - 1) - 0.5
    return 464.0 if layout.values == "e4m3" else 7.0  # half way from 448 to 480, and from 6 to 8


def _row(constants_RD: torch.Tensor | None, sender: int) -> torch.Tensor | None:
    return None if constants_RD is None else constants_RD[sender]
