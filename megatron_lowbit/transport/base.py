"""Transport: how tensors travel between the processes of a group, and what went out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch


class CommunicationError(RuntimeError):
    """This rank lost contact with another: it ended, or did not answer in time."""


@dataclass
class TrafficCounter:
    """Payload bytes and messages this process handed to its transport, split by purpose."""

    sent_nbytes: dict[str, int] = field(default_factory=dict)
    messages: dict[str, int] = field(default_factory=dict)

    def add(self, purpose: str, nbytes: int, messages: int) -> None:
        self.sent_nbytes[purpose] = self.sent_nbytes.get(purpose, 0) + nbytes
        self.messages[purpose] = self.messages.get(purpose, 0) + messages

    def total_nbytes(self) -> int:
        return sum(self.sent_nbytes.values())

    def reset(self) -> None:
        self.sent_nbytes.clear()
        self.messages.clear()


class Transport(Protocol):
    """Point-to-point messages. Between two ranks they arrive in the order they were sent; sizes are known to both.

    Tensors are contiguous, not empty and, until `wait` says so, the transport's: neither written nor freed.
    """

    name: str
    #: True where bytes move while the caller computes: then cutting a large message into pieces pays.
    overlaps: bool

    def send(self, peer: int, tensor: torch.Tensor) -> None:
        """Starts sending; never blocks."""
        ...

    def receive(self, peer: int, tensor: torch.Tensor) -> int:
        """Says where the next message of `peer` goes; returns a ticket to wait for."""
        ...

    def progress(self) -> None:
        """Moves what can be moved without waiting; between two computations, say."""
        ...

    def wait(self, tickets: Sequence[int] | None) -> None:
        """Returns when these messages have arrived; with None, when all have and all sent tensors may be reused.

        Raises CommunicationError where a peer ended or did not answer in time.
        """
        ...

    def close(self) -> None: ...


def ranks_text(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
