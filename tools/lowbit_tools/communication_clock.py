"""Where the time of a forward pass goes: at sync points, waiting for other messages, or in the rank's own work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from megatron_lowbit.comm.sync_point import SyncPoint
from megatron_lowbit.layers.linear import RowParallelLinear
from megatron_lowbit.layers.moe import MoE
from megatron_lowbit.transport.base import Transport

SYNC, ELSEWHERE = "sync", "elsewhere"


@dataclass
class CommunicationClock:
    """Seconds spent in each place since `reset`. Nested stretches count once, where they began.

    On a GPU, events on the stream are timed, so that nothing waits for the clock.
    """

    device: torch.device
    calls: int = 0
    _seconds: dict[str, float] = field(default_factory=dict)
    _events: list[tuple[str, Any, Any]] = field(default_factory=list)
    _inside: bool = False

    def reset(self) -> None:
        self.calls = 0
        self._seconds.clear()
        self._events.clear()

    def run(self, place: str, work: Any, *args: Any) -> Any:
        """`work(*args)`, timed."""
        if self._inside:
            return work(*args)
        self._inside = True
        began = self._now()
        try:
            return work(*args)
        finally:
            self._inside = False
            if self.device.type == "cuda":
                self._events.append((place, began, self._now()))
            else:
                self._seconds[place] = self._seconds.get(place, 0.0) + self._now() - began
            self.calls += place == SYNC

    def seconds(self, place: str) -> float:
        """Waits for a GPU to be done."""
        if self._events:
            torch.cuda.synchronize(self.device)
            for where, began, ended in self._events:
                self._seconds[where] = self._seconds.get(where, 0.0) + began.elapsed_time(ended) / 1e3
            self._events.clear()
        return self._seconds.get(place, 0.0)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class TimedSyncPoint(SyncPoint):
    """A sync point on a clock: encoding, sending, waiting, decoding and the addition to the residual."""

    def __init__(self, timed: SyncPoint, clock: CommunicationClock) -> None:
        self.name = timed.name
        self._timed = timed
        self._clock = clock

    def add(self, *args: Any) -> torch.Tensor:
        result: torch.Tensor = self._clock.run(SYNC, self._timed.add, *args)
        return result


def time_sync_points(model: nn.Module, clock: CommunicationClock) -> int:
    """Puts every sync point of `model` on the clock; returns how many there are."""
    layers = [module for module in model.modules() if isinstance(module, RowParallelLinear | MoE)]
    for layer in layers:
        layer.sync_point = TimedSyncPoint(layer.sync_point, clock)
    return len(layers)


class TimedTransport:
    """A transport whose waiting is on a clock: outside sync points, for rows of the embedding and best tokens."""

    def __init__(self, timed: Transport, clock: CommunicationClock) -> None:
        self.name, self.overlaps = timed.name, timed.overlaps
        self._timed = timed
        self._clock = clock

    def send(self, peer: int, tensor: torch.Tensor) -> None:
        self._timed.send(peer, tensor)

    def receive(self, peer: int, tensor: torch.Tensor) -> int:
        return self._timed.receive(peer, tensor)

    def progress(self) -> None:
        self._timed.progress()

    def wait(self, tickets: Sequence[int] | None) -> None:
        self._clock.run(ELSEWHERE, self._timed.wait, tickets)

    def close(self) -> None:
        self._timed.close()
