"""One-stage all-reduce: every rank sends its whole packet to every other; one quantisation, (R-1)x the bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.exchange import REDUCE
from megatron_lowbit.comm.workspace import Workspace
from megatron_lowbit.parallel import ParallelContext

# Shapes: L ranks living in this process (1), T tokens, H hidden features, B bytes of a packet row, R ranks.


@dataclass
class _Packets:
    """Buffers for messages of one shape."""

    packets_RTB: torch.Tensor
    incoming: dict[int, torch.Tensor]  # [T, B] of each other rank

    @property
    def nbytes(self) -> int:
        return self.packets_RTB.nbytes


class OneStageAllReduce:
    """`full_TH = all_reduce(partial_LTH)` in one exchange. Pays for few ranks or few tokens.

    workspace: buffers shared with other sync points.
    """

    stages = 1

    def __init__(
        self, context: ParallelContext, codec: Codec, name: str = "", workspace: Workspace | None = None
    ) -> None:
        self._context = context
        self._name = name
        self._codec = codec
        self._workspace = Workspace() if workspace is None else workspace

    def __call__(self, partial_LTH: torch.Tensor, add_to_TH: torch.Tensor | None = None) -> torch.Tensor:
        """FP32 sum `[T, H]` of all ranks' partials, bit-identical on every rank.

        add_to_TH: FP32; the sum is added to it in place, and it is returned.
        """
        (partial_TH,) = partial_LTH
        tokens, device = partial_TH.shape[0], partial_TH.device
        key = (tokens, self._codec.layout, device)
        packets = self._workspace.get(key, lambda: self._make_packets(tokens, device))
        mine_TB = packets.packets_RTB[self._context.rank]
        self._codec.encode(partial_TH, sender=self._context.rank, packet_TB=mine_TB)
        self._context.exchange(dict.fromkeys(self._context.peers, mine_TB), packets.incoming, REDUCE, self._name)
        sum_TH = self._codec.decode_sum(packets.packets_RTB)
        return sum_TH if add_to_TH is None else add_to_TH.add_(sum_TH)

    def _make_packets(self, tokens: int, device: torch.device) -> _Packets:
        shape = (self._context.size, tokens, self._codec.layout.row_nbytes)
        packets_RTB = torch.empty(shape, dtype=torch.uint8, device=device)
        return _Packets(packets_RTB, {peer: packets_RTB[peer] for peer in self._context.peers})
