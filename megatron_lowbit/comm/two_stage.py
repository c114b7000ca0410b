"""Two-stage all-reduce: reduce-scatter of packets to each token's owner, then all-gather of the re-encoded sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.exchange import AUTOMATIC, TwoStageExchange
from megatron_lowbit.comm.workspace import Workspace
from megatron_lowbit.parallel import ParallelContext

# Shapes: L ranks living in this process (1), T tokens, P tokens of a piece, S own tokens of a piece, H hidden features,
# B bytes of a packet row.


class TwoStageAllReduce:
    """`full_TH = all_reduce(partial_LTH)` over real ranks (Flash Communication, arXiv 2412.04964, section 3).

    The owner of a token sums whole rows. piece_nbytes, workspace, name: see `TwoStageExchange`.
    """

    stages = 2

    def __init__(
        self,
        context: ParallelContext,
        reduce_codec: Codec,
        gather_codec: Codec,
        name: str = "",
        piece_nbytes: int = AUTOMATIC,
        workspace: Workspace | None = None,
    ) -> None:
        self._rank = context.rank
        self._codecs = reduce_codec, gather_codec
        row_nbytes = reduce_codec.layout.row_nbytes, gather_codec.layout.row_nbytes
        self._exchange = TwoStageExchange(context, *row_nbytes, name, piece_nbytes, workspace)

    def __call__(self, partial_LTH: torch.Tensor, add_to_TH: torch.Tensor | None = None) -> torch.Tensor:
        """FP32 sum `[T, H]` of all ranks' partials, bit-identical on every rank.

        add_to_TH: FP32; the sum is added to it in place, and it is returned.
        """
        (partial_TH,) = partial_LTH
        out_TH = torch.empty(partial_TH.shape, device=partial_TH.device) if add_to_TH is None else add_to_TH
        steps = _CodecSteps(*self._codecs, self._rank, partial_TH, out_TH, add=add_to_TH is not None)
        self._exchange.run(partial_TH.shape[0], partial_TH.device, steps)
        return out_TH


@dataclass
class _CodecSteps:
    """The partials as they are through the codecs."""

    reduce_codec: Codec
    gather_codec: Codec
    rank: int
    partial_TH: torch.Tensor
    out_TH: torch.Tensor
    add: bool

    def encode(self, rows: slice, packet_PB: torch.Tensor) -> None:
        self.reduce_codec.encode(self.partial_TH[rows], sender=self.rank, packet_TB=packet_PB)

    def reduce(self, rows: slice, packets_RSB: Sequence[torch.Tensor], packet_SB: torch.Tensor) -> None:
        self.reduce_codec.requantize(packets_RSB, self.gather_codec, packet_SB)

    def decode(self, rows: slice, packet_PB: torch.Tensor) -> None:
        self.gather_codec.decode(packet_PB, sender=0, out_TH=self.out_TH[rows], add=self.add)
