"""One-stage all-reduce: every rank sends its whole packet to every other; one quantisation, (R-1)x the bytes."""

from __future__ import annotations

import torch

from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.two_stage import REDUCE
from megatron_lowbit.parallel import ParallelContext

# Shapes: L ranks living in this process (1), T tokens, H hidden features, B bytes of a packet row, R ranks.


class OneStageAllReduce:
    """`full_TH = all_reduce(partial_LTH)` in one exchange. Pays for few ranks or few tokens."""

    stages = 1

    def __init__(self, context: ParallelContext, codec: Codec, name: str = "") -> None:
        self._context = context
        self._name = name
        self._codec = codec

    def __call__(self, partial_LTH: torch.Tensor) -> torch.Tensor:
        """FP32 sum `[T, H]` of all ranks' partials, bit-identical on every rank."""
        (partial_TH,) = partial_LTH
        rank, size = self._context.rank, self._context.size
        packet_TB = self._codec.encode(partial_TH, sender=rank)
        packets_RTB = packet_TB.new_empty(size, *packet_TB.shape)
        packets_RTB[rank] = packet_TB
        peers = self._context.peers
        self._context.exchange(
            dict.fromkeys(peers, packet_TB), {peer: packets_RTB[peer] for peer in peers}, REDUCE, self._name
        )
        return self._codec.decode_sum(packets_RTB)
