"""The same collectives with all ranks inside one process: what a scheme does to quality, without a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.exchange import GATHER, REDUCE, Steps
from megatron_lowbit.parallel import TrafficCounter

# Shapes: L ranks living in this process (all R), T tokens, H hidden features, B bytes of a packet row.


class VirtualAllReduce:
    """Encodes, sums and decodes as real ranks would: bit-identical to them for identical partials.

    `gather_codec=None` plays the one-stage collective. `traffic` counts what all ranks together would have sent.
    """

    def __init__(self, reduce_codec: Codec, gather_codec: Codec | None, traffic: TrafficCounter) -> None:
        self._reduce_codec = reduce_codec
        self._gather_codec = gather_codec
        self._traffic = traffic
        self.stages = 1 if gather_codec is None else 2

    def __call__(self, partial_LTH: torch.Tensor, add_to_TH: torch.Tensor | None = None) -> torch.Tensor:
        """FP32 sum `[T, H]` of the partials of all ranks; added to `add_to_TH` in place, where it is given."""
        full_TH = self._reduced(partial_LTH)
        return full_TH if add_to_TH is None else add_to_TH.add_(full_TH)

    def _reduced(self, partial_LTH: torch.Tensor) -> torch.Tensor:
        ranks, tokens = partial_LTH.shape[:2]
        packets = [self._reduce_codec.encode(partial_LTH[rank], sender=rank) for rank in range(ranks)]
        sum_TH = self._reduce_codec.decode_sum(packets)
        row_nbytes = self._reduce_codec.layout.row_nbytes
        if self._gather_codec is None:
            senders = ranks if tokens else 0  # empty messages are not sent
            self._traffic.add(REDUCE, senders * (ranks - 1) * tokens * row_nbytes, senders * (ranks - 1))
            return sum_TH
        packet_TB = self._gather_codec.encode(sum_TH, sender=0)
        count_two_stages(self._traffic, ranks, tokens, row_nbytes, self._gather_codec.layout.row_nbytes)
        return self._gather_codec.decode(packet_TB, sender=0)


class VirtualExchange:
    """`TwoStageExchange` with all ranks in this process: all partials encoded, one sum, decoded by each."""

    def __init__(self, reduce_row_nbytes: int, gather_row_nbytes: int, traffic: TrafficCounter) -> None:
        self._row_nbytes = reduce_row_nbytes, gather_row_nbytes
        self._traffic = traffic

    def run_all(self, tokens: int, device: torch.device, steps: Sequence[Steps]) -> None:
        """Does the steps of all ranks for all tokens; the first rank plays every owner."""
        rows = slice(0, tokens)
        reduce_nbytes, gather_nbytes = self._row_nbytes
        packets_RTB = torch.empty(len(steps), tokens, reduce_nbytes, dtype=torch.uint8, device=device)
        for rank, packet_TB in zip(steps, packets_RTB, strict=True):
            rank.encode(rows, packet_TB)
        sum_TB = torch.empty(tokens, gather_nbytes, dtype=torch.uint8, device=device)
        steps[0].reduce(rows, list(packets_RTB), sum_TB)
        for rank in steps:
            rank.decode(rows, sum_TB)
        count_two_stages(self._traffic, len(steps), tokens, reduce_nbytes, gather_nbytes)


def count_two_stages(
    traffic: TrafficCounter, ranks: int, tokens: int, reduce_row_nbytes: int, gather_row_nbytes: int
) -> None:
    """What all ranks together would have sent."""
    owners = min(ranks, tokens)
    traffic.add(REDUCE, (ranks - 1) * tokens * reduce_row_nbytes, owners * (ranks - 1))
    traffic.add(GATHER, (ranks - 1) * tokens * gather_row_nbytes, owners * (ranks - 1))
