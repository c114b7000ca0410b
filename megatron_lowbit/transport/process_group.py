"""ProcessGroupTransport: messages through torch's own process group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_lowbit.transport.base import CommunicationError, ranks_text


class ProcessGroupTransport:
    """Messages through torch's process group: gloo on any device, NCCL on GPUs (in one batch, as it wants them)."""

    name = "torch process group"
    overlaps = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._queued: list[dist.P2POp] = []
        self._started = 0
        self._tickets = 0
        self._peers: set[int] = set()

    def send(self, peer: int, tensor: torch.Tensor) -> None:
        self._peers.add(peer)
        self._queued.append(dist.P2POp(dist.isend, tensor, group=self._group, group_peer=peer))

    def receive(self, peer: int, tensor: torch.Tensor) -> int:
        self._peers.add(peer)
        self._queued.append(dist.P2POp(dist.irecv, tensor, group=self._group, group_peer=peer))
        self._tickets += 1
        return self._tickets

    def progress(self) -> None:
        return

    def wait(self, tickets: Sequence[int] | None) -> None:
        operations, self._queued = self._queued, []
        if not operations:  # an earlier wait took everything that was queued
            return
        peers, self._peers = self._peers, set()
        try:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        except RuntimeError as error:
            raise CommunicationError(f"rank {ranks_text(sorted(peers))} ({str(error).splitlines()[0]})") from error

    def close(self) -> None:
        self._queued = []
