"""Collectives that compensate, timed as others are: with a random block input and predictor and a running loop."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_lowbit.calibration.artifact import SyncPointStatistics
from megatron_lowbit.calibration.moments import SyncPointMoments
from megatron_lowbit.calibration.step_observer import StepObserver
from megatron_lowbit.comm.all_reduce import AllReduce
from megatron_lowbit.comm.compensation import CompensatedAllReduce, LoopState
from megatron_lowbit.comm.predictor import Predictor
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.comm.sync_point import SyncPoint

# Shapes: R ranks, T tokens, H hidden features, K rank of the predictor.


class JoinedAllReduce:
    """A sync point behind the signature of a plain collective; one state for all calls, as through a model."""

    def __init__(self, inner: AllReduce | CompensatedAllReduce, input_TH: torch.Tensor) -> None:
        self._point = SyncPoint("bench", inner)
        self._input_TH = input_TH
        self._state = LoopState()

    def __call__(self, partial_LTH: torch.Tensor, add_to_TH: torch.Tensor | None = None) -> torch.Tensor:
        out_TH = torch.zeros(partial_LTH.shape[1:], device=partial_LTH.device) if add_to_TH is None else add_to_TH
        return self._point.add(partial_LTH, out_TH, None, self._input_TH, self._state)


def random_input(tokens: int, hidden: int) -> torch.Tensor:
    """bf16 `[T, H]`, the same on all ranks."""
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens + 1)).bfloat16()


def with_moments(point: SyncPointStatistics, scheme: CommScheme, partials_RTH: torch.Tensor) -> SyncPointStatistics:
    """Statistics that the scheme can be built from; the predictor is random, as speed does not depend on it."""
    if scheme.portable and not scheme.has_static_stage:
        return point
    ranks, _, hidden = partials_RTH.shape
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-100, 101, shape, generator=generator, dtype=torch.int8)

    width = max(scheme.predictor_rank, 1)
    # coefficients of ranks that add up to one byte, as fitted ones do
    predictor = Predictor(
        torch.full((hidden,), 6.0), codes(hidden, width) // 8, torch.zeros(width), torch.full((width,), 0.01),
        codes(ranks, width, hidden) // ranks, torch.full((hidden,), 2.0**-12),
    )  # fmt: skip
    partial_rms, sum_rms = (each.square().mean(dim=-2).sqrt() for each in (partials_RTH, partials_RTH.sum(dim=0)))
    partial_steps, sum_steps = StepObserver(), StepObserver()
    weight_T = torch.ones(partials_RTH.shape[1])
    partial_steps.update(partials_RTH, weight_T)
    sum_steps.update(partials_RTH.sum(dim=0, keepdim=True), weight_T)
    moments = SyncPointMoments(
        partial_rms, sum_rms, partial_rms, sum_rms, torch.ones(ranks), predictor, partials_RTH.mean(dim=1),
        partial_steps.steps(), sum_steps.steps()[:, 0],
    )  # fmt: skip
    return replace(point, moments=moments)
