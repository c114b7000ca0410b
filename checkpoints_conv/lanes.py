"""Lanes: a few threads, each of which does its jobs in the order given, while the caller prepares the next ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

BATCHES_AHEAD = 3
BATCH_NBYTES = 4 << 20


class Lanes:
    """A context manager. Jobs of one lane run one after another, those of several lanes side by side.

    The caller says with `handed_over` how many bytes its last jobs hold. Every BATCH_NBYTES it is kept waiting there
    until no more than BATCHES_AHEAD such batches are under way, so memory is bounded. What a job raises is raised
    there, or by `drain`. Hashing, writing and copying let go of Python's lock, so threads are enough.
    """

    def __init__(self, count: int) -> None:
        self._pools = [ThreadPoolExecutor(1, thread_name_prefix=f"lane-{lane}") for lane in range(count)]
        self._batch: list[Future[Any]] = []
        self._batch_nbytes = 0
        self._batches: deque[tuple[int, list[Future[Any]]]] = deque()
        self.done_nbytes = 0
        """Of the batches that are complete."""

    def __enter__(self) -> Lanes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, lane: int, job: Callable[..., object], *arguments: Any) -> None:
        """Appends a job to lane `lane`, counted round."""
        self._batch.append(self._pools[lane % len(self._pools)].submit(job, *arguments))

    def handed_over(self, nbytes: int) -> None:
        """The jobs since the last call hold `nbytes` bytes."""
        self._batch_nbytes += nbytes
        if self._batch_nbytes >= BATCH_NBYTES:
            self._end_batch()
        while len(self._batches) > BATCHES_AHEAD:
            self._wait()

    def drain(self) -> None:
        """Waits for everything."""
        self._end_batch()
        while self._batches:
            self._wait()

    def _end_batch(self) -> None:
        self._batches.append((self._batch_nbytes, self._batch))
        self._batch, self._batch_nbytes = [], 0

    def _wait(self) -> None:
        nbytes, jobs = self._batches.popleft()
        for job in jobs:
            job.result()
        self.done_nbytes += nbytes
