"""RotatedCodec: a codec whose features are mixed before they are grouped, so that none of a group stands out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowbit_kernels import Backend
from lowbit_kernels.foretell import Share, unsent
from lowbit_kernels.mixed import Mixing, get_mixed
from lowbit_kernels.rotation import Rotation
from megatron_lowbit.comm.codec import Codec, requantize_in_steps
from megatron_lowbit.comm.saturation import SaturationCounter
from megatron_lowbit.comm.wire_format import WireFormat

# Shapes: T tokens, H hidden features, D body features, K outliers, R ranks, B bytes of a packet row.


class RotatedCodec(Codec):
    """A Codec of a rotated format.

    Packets are of rows [H rotated features | K outliers], see `Mixing`. A rotation is linear: packets are summed as
    they arrive, and the sum is rotated back, once. So all senders share the factors of a prescaled format, `factor_1H`.
    """

    rotates = True

    def __init__(
        self,
        wire_format: WireFormat,
        hidden: int,
        backend: Backend,
        outlier_index: torch.Tensor | None = None,
        factor_1H: torch.Tensor | None = None,
        saturation: SaturationCounter | None = None,
    ) -> None:
        assert (factor_1H is not None) == wire_format.prescaled and (factor_1H is None or len(factor_1H) == 1)
        features = outlier_index if wire_format.outlier_count(hidden) else None
        factor_H = None if factor_1H is None else factor_1H[0]
        self._mixing = Mixing(Rotation(hidden, wire_format.rotation), factor_H, features)
        self._mixed = get_mixed(backend)
        super().__init__(wire_format, hidden, backend, *self._mixing.places, saturation=saturation)

    def encode(self, x_TH: torch.Tensor, sender: int, packet_TB: torch.Tensor | None = None) -> torch.Tensor:
        """See `Codec.encode`."""
        if packet_TB is None:
            packet_TB = torch.empty(x_TH.shape[0], self.layout.row_nbytes, dtype=torch.uint8, device=x_TH.device)
        if self._saturation is not None:
            self._saturation.count(x_TH, None)
        self._mixed.encode_mixed(x_TH, self.layout, packet_TB, self._mixing)
        return packet_TB

    def decode(
        self, packet_TB: torch.Tensor, sender: int, out_TH: torch.Tensor | None = None, add: bool = False
    ) -> torch.Tensor:
        """See `Codec.decode`."""
        if out_TH is None:
            out_TH = self._room(packet_TB)
        self._mixed.decode_mixed([packet_TB], self.layout, out_TH, self._mixing, add)
        return out_TH

    def decode_sum(
        self, packets_RTB: Sequence[torch.Tensor] | torch.Tensor, out_TH: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Codec.decode_sum`; added in rank order as they arrive, rotated."""
        if out_TH is None:
            out_TH = self._room(packets_RTB[0])
        self._mixed.decode_mixed(packets_RTB, self.layout, out_TH, self._mixing)
        return out_TH

    def requantize(self, packets_RTB: Sequence[torch.Tensor], gather: Codec, packet_TB: torch.Tensor) -> None:
        """See `Codec.requantize`."""
        requantize_in_steps(self, packets_RTB, gather, packet_TB)

    def encode_feedback(
        self,
        x_TH: torch.Tensor,
        sender: int,
        packet_TB: torch.Tensor,
        share: Share | None,
        missed_TH: torch.Tensor | None,
    ) -> None:
        """See `Codec.encode_feedback`."""
        value_TH = unsent(x_TH, share, missed_TH)
        self.encode(value_TH, sender, packet_TB)
        if missed_TH is not None:
            torch.sub(value_TH, self.decode(packet_TB, sender), out=missed_TH)

    def requantize_feedback(
        self, packets_RTB: Sequence[torch.Tensor], gather: Codec, packet_TB: torch.Tensor, owed_TH: torch.Tensor | None
    ) -> None:
        """See `Codec.requantize_feedback`."""
        requantize_in_steps(self, packets_RTB, gather, packet_TB, owed_TH)

    def decode_foretold(self, packet_TB: torch.Tensor, sender: int, out_TH: torch.Tensor, share: Share | None) -> None:
        """See `Codec.decode_foretold`."""
        self.decode(packet_TB, sender, out_TH, add=True)
        if share is not None:
            out_TH += share.values()

    def _room(self, packet_TB: torch.Tensor) -> torch.Tensor:
        return torch.empty(packet_TB.shape[0], self._mixing.rotation.features, device=packet_TB.device)


def make_codec(
    wire_format: WireFormat,
    hidden: int,
    backend: Backend,
    body_index: torch.Tensor | None = None,
    outlier_index: torch.Tensor | None = None,
    scale_RD: torch.Tensor | None = None,
    saturation: SaturationCounter | None = None,
    minimum_RD: torch.Tensor | None = None,
) -> Codec:
    """The codec of a format, with what `SyncPointConstants` hold for its stage."""
    if wire_format.rotation:
        assert minimum_RD is None, wire_format
        return RotatedCodec(wire_format, hidden, backend, outlier_index, scale_RD, saturation)
    return Codec(wire_format, hidden, backend, body_index, outlier_index, scale_RD, saturation, minimum_RD)
