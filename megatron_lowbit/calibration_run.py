"""calibrate: runs a model with observing sync points over text and returns what they saw."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from megatron_lowbit.calibration.artifact import CommCalibration, SyncPointStatistics
from megatron_lowbit.calibration.observer import ObservingAllReduce
from megatron_lowbit.comm.all_reduce import AllReduce, build_all_reduce
from megatron_lowbit.comm.constants import NO_CONSTANTS
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.weights import ModelWeights


def calibrate(
    weights: ModelWeights,
    sequences: Sequence[Sequence[int]],
    text_sha256: str,
    progress: Callable[[int, int], None] | None = None,
) -> CommCalibration:
    """Statistics of every sync point over token `sequences` (one forward pass each), the same on all ranks.

    text_sha256: of the text they came from, recorded for the reader. progress: called with (done, total) sequences.
    """
    context, hidden = weights.context, weights.config.hidden_size
    if context.size == 1:
        raise ValueError("calibration needs at least 2 tensor-parallel ranks; pass --tp N or --virtual-tp N")
    if not sequences:
        raise ValueError("calibration needs at least one sequence; use a longer text")
    exact = parse_scheme("exact").for_dtype(weights.dtype)
    observers: dict[str, ObservingAllReduce] = {}

    def observe(name: str) -> AllReduce:
        observers[name] = ObservingAllReduce(build_all_reduce(context, exact, hidden, NO_CONSTANTS))
        return observers[name]

    model = weights.build(observe)
    for done, sequence in enumerate(sequences):
        model(TokenBatch.prompts([sequence], context.device))
        if progress is not None:
            progress(done + 1, len(sequences))
    points = {}
    for name, observer in observers.items():
        partial_min, partial_max = observer.partial.minimum, observer.partial.maximum
        sum_min, sum_max = observer.sum.minimum, observer.sum.maximum
        assert partial_min is not None and partial_max is not None and sum_min is not None and sum_max is not None
        if not context.virtual:  # each rank saw its own partial only
            stacked = context.all_gather(torch.cat((partial_min, partial_max)), "calibration")
            partial_min, partial_max = stacked[:, 0], stacked[:, 1]
        _check_finite(name, partial_min, partial_max)
        points[name] = SyncPointStatistics(
            partial_min.cpu(), partial_max.cpu(), sum_min.flatten().cpu(), sum_max.flatten().cpu()
        )
    return CommCalibration(
        fingerprint=weights.fingerprint,
        tp=context.size,
        hidden=hidden,
        sequences=len(sequences),
        length=max(len(sequence) for sequence in sequences),
        text_sha256=text_sha256,
        sync_points=points,
    )


def text_digest(text: str) -> str:
    """Hex SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def _check_finite(name: str, *ranges: torch.Tensor) -> None:
    for tensor in ranges:
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"sync point {name} produced values that are not finite during calibration; the checkpoint is damaged "
                "or its activations overflow this dtype"
            )
