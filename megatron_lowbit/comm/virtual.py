"""The same collectives with all ranks inside one process: what a scheme does to quality, without a network."""

from __future__ import annotations

import torch

from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.exchange import GATHER, REDUCE
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
        owners = min(ranks, tokens)
        self._traffic.add(REDUCE, (ranks - 1) * tokens * row_nbytes, owners * (ranks - 1))
        self._traffic.add(GATHER, (ranks - 1) * tokens * self._gather_codec.layout.row_nbytes, owners * (ranks - 1))
        return self._gather_codec.decode(packet_TB, sender=0)
