"""Timing collectives: calls take turns, every round starts at a barrier and counts as long as its slowest rank."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from megatron_lowbit.parallel import ParallelContext

WARM_UP_ROUNDS = 3
RESAMPLES = 1000


def interleaved(
    context: ParallelContext, calls: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = WARM_UP_ROUNDS
) -> dict[str, list[float]]:
    """Seconds of each call and round, the slowest rank's, the same on all ranks."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + warm_up):
        for name, call in calls.items():
            _synchronise(context)
            context.barrier()
            began = time.perf_counter()
            call()
            _synchronise(context)
            if turn >= warm_up:
                times[name].append(time.perf_counter() - began)
    return {
        name: [max(column) for column in zip(*context.all_gather_json(values), strict=True)]
        for name, values in times.items()
    }


def ratio_interval(baseline: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """95 % interval of median(baseline) / median(seconds), from resampled rounds; the same for the same numbers."""
    generator = random.Random(0)
    ratios = []
    for _ in range(RESAMPLES):
        rounds = generator.choices(range(len(seconds)), k=len(seconds))
        ratios.append(statistics.median(baseline[i] for i in rounds) / statistics.median(seconds[i] for i in rounds))
    ratios.sort()
    return ratios[int(0.025 * RESAMPLES)], ratios[int(0.975 * RESAMPLES)]


def _synchronise(context: ParallelContext) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
