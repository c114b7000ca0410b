"""Latency of all-reduces: each scheme and torch's own take turns, so that drift of the machine hits all alike."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_lowbit.calibration.artifact import SyncPointStatistics
from megatron_lowbit.calibration.observer import RangeObserver
from megatron_lowbit.calibration.outliers import constants_from_statistics
from megatron_lowbit.comm.all_reduce import build_all_reduce
from megatron_lowbit.comm.reference import all_reduce as reference_all_reduce
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.parallel import ParallelContext

# Shapes: R ranks, T tokens, H hidden features.

BASELINE = "torch.distributed.all_reduce"
WARM_UP_ROUNDS = 3


@dataclass(frozen=True)
class AllReduceRow:
    """Microseconds of the slowest rank over interleaved rounds; ratio above 1 is faster than torch's all-reduce."""

    tokens: int
    hidden: int
    scheme: str
    tp: int
    median_us: float
    p10_us: float
    p90_us: float
    ratio_to_torch_all_reduce: float


def bench_all_reduce(
    context: ParallelContext,
    sizes: Sequence[int],
    hidden: int,
    schemes: Sequence[CommScheme],
    rounds: int,
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[AllReduceRow]:
    """Rows of torch's baseline and every scheme for each number of tokens.

    Each scheme's result is compared bit for bit with the reference before anything is timed; AssertionError where
    they differ.
    """
    rows = []
    for done, tokens in enumerate(sizes):
        # all ranks draw all partials, so that each can check the result by itself
        generator = torch.Generator().manual_seed(tokens)
        partials = [torch.randn(tokens, hidden, generator=generator).bfloat16() for _ in range(context.size)]
        mine = partials[context.rank].to(context.device)
        calls: dict[str, Callable[[], object]] = {BASELINE: _torch_all_reduce(context, mine)}
        for scheme in schemes:
            wire = scheme.for_dtype(torch.bfloat16)
            constants = constants_from_statistics(wire, "bench", _statistics(partials))
            expected = reference_all_reduce(partials, wire, constants)
            all_reduce = build_all_reduce(context, wire, hidden, constants.to(context.device), backend)
            assert torch.equal(all_reduce(mine.unsqueeze(0)).cpu(), expected), f"{scheme.name} differs from reference"
            calls[scheme.name] = functools.partial(all_reduce, mine.unsqueeze(0))
        times = _interleaved(context, calls, rounds)
        baseline = statistics.median(times[BASELINE])
        for name, seconds in times.items():
            ordered = sorted(1e6 * value for value in seconds)
            median = statistics.median(ordered)
            rows.append(
                AllReduceRow(
                    tokens,
                    hidden,
                    name,
                    context.size,
                    median,
                    ordered[len(ordered) // 10],
                    ordered[9 * len(ordered) // 10],
                    1e6 * baseline / median,
                )
            )
        if progress is not None:
            progress(done + 1, len(sizes))
    return rows


def _torch_all_reduce(context: ParallelContext, mine: torch.Tensor) -> Callable[[], object]:
    buffer = torch.empty_like(mine)

    def call() -> None:
        # the in-place sum would grow without bound; the copy is the same for a caller that keeps its partial
        buffer.copy_(mine)
        dist.all_reduce(buffer, group=context.group)

    return call


def _interleaved(
    context: ParallelContext, calls: dict[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call and round, the slowest rank's, the same on all ranks."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + WARM_UP_ROUNDS):
        for name, call in calls.items():
            _synchronise(context)
            context.barrier()
            began = time.perf_counter()
            call()
            _synchronise(context)
            if turn >= WARM_UP_ROUNDS:
                times[name].append(time.perf_counter() - began)
    return {
        name: [max(column) for column in zip(*context.all_gather_json(values), strict=True)]
        for name, values in times.items()
    }


def _synchronise(context: ParallelContext) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)


def _statistics(partials: Sequence[torch.Tensor]) -> SyncPointStatistics:
    """Ranges of these very values: latency does not depend on them, the check before timing does."""
    if partials[0].shape[0] == 0:
        partials = [torch.ones(1, partials[0].shape[1]) for _ in partials]
    partial, total = RangeObserver(), RangeObserver()
    stacked_RTH = torch.stack(list(partials)).float()
    partial.update(stacked_RTH)
    total.update(stacked_RTH.sum(dim=0, keepdim=True))
    assert partial.minimum is not None and partial.maximum is not None
    assert total.minimum is not None and total.maximum is not None
    return SyncPointStatistics(partial.minimum, partial.maximum, total.minimum[0], total.maximum[0])
