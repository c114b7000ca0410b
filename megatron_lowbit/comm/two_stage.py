"""Two-stage all-reduce: reduce-scatter of packets to each token's owner, then all-gather of the re-encoded sums."""

from __future__ import annotations

import torch

from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sharding import cut_evenly

# Shapes: L ranks living in this process (1), T tokens, S own tokens, H hidden features, B bytes of a packet row.

REDUCE, GATHER = "reduce", "gather"


class TwoStageAllReduce:
    """`full_TH = all_reduce(partial_LTH)` over real ranks (Flash Communication, arXiv 2412.04964, section 3).

    Token t belongs to one rank: contiguous blocks, the first ones a token longer. The owner sums whole rows.
    """

    stages = 2

    def __init__(self, context: ParallelContext, reduce_codec: Codec, gather_codec: Codec, name: str = "") -> None:
        self._context = context
        self._name = name
        self._reduce_codec = reduce_codec
        self._gather_codec = gather_codec

    def __call__(self, partial_LTH: torch.Tensor) -> torch.Tensor:
        """FP32 sum `[T, H]` of all ranks' partials, bit-identical on every rank."""
        (partial_TH,) = partial_LTH
        spans = cut_evenly(partial_TH.shape[0], self._context.size)
        return self._gather_stage(self._reduce_stage(partial_TH, spans), spans)

    def _reduce_stage(self, partial_TH: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
        """FP32 sum `[S, H]` of the tokens this rank owns."""
        rank, peers = self._context.rank, self._context.peers
        packet_TB = self._reduce_codec.encode(partial_TH, sender=rank)
        start, stop = spans[rank]
        received = {peer: packet_TB.new_empty(stop - start, packet_TB.shape[1]) for peer in peers}
        self._context.exchange({peer: packet_TB[slice(*spans[peer])] for peer in peers}, received, REDUCE, self._name)
        # the rank's own partial goes through the packet too, or the sum would depend on who owns the token
        received[rank] = packet_TB[start:stop]
        return self._reduce_codec.decode_sum([received[peer] for peer in range(self._context.size)])

    def _gather_stage(self, sum_SH: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
        rank, peers = self._context.rank, self._context.peers
        tokens = spans[-1][1]
        packet_TB = torch.empty(tokens, self._gather_codec.layout.row_nbytes, dtype=torch.uint8, device=sum_SH.device)
        mine = packet_TB[slice(*spans[rank])]
        self._gather_codec.encode(sum_SH, sender=0, packet_TB=mine)
        incoming = {peer: packet_TB[slice(*spans[peer])] for peer in peers}
        self._context.exchange(dict.fromkeys(peers, mine), incoming, GATHER, self._name)
        # every rank decodes every packet, its own included: replicas stay bit-identical
        return self._gather_codec.decode(packet_TB, sender=0)
