"""The error of every scheme against the exact sum, held to the bound that its step sizes give."""

from __future__ import annotations

import pytest
import torch

from megatron_lowbit.calibration.artifact import SyncPointStatistics
from megatron_lowbit.calibration.outliers import constants_from_statistics
from megatron_lowbit.comm.all_reduce import build_all_reduce
from megatron_lowbit.comm.constants import SyncPointConstants
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.comm.wire_format import WireFormat
from megatron_lowbit.parallel import ParallelContext

RANKS, TOKENS, HIDDEN = 4, 64, 320
BF16_HALF_ULP = 2.0**-8  # of a number at the foot of its binade: 8 bits of significand, the first of them implied
#: FP32 sums of 4 numbers below 2^7: three roundings of at most half an ulp of 2^6 each
FP32_SUM = 3 * 2.0**6 * 2.0**-24


def statistics(partials: torch.Tensor) -> SyncPointStatistics:
    """Ranges a tenth wider than the values, and than the sum of what can arrive: nothing is clipped."""
    peak, sum_peak = 1.1 * partials.abs().amax(dim=1), 1.1 * partials.sum(dim=0).abs().amax(dim=0)
    sum_peak = sum_peak + peak.sum(dim=0) / 14  # each rank may add half a step of a seventh of its range
    return SyncPointStatistics(-peak, peak, -sum_peak, sum_peak)


def bound_of(
    wire: WireFormat, values_TH: torch.Tensor, scale_D: torch.Tensor | None, constants: SyncPointConstants
) -> torch.Tensor:
    """FP64 `[T, H]`: how far what arrives may be from `values_TH` in one encoding by `wire`."""
    values = values_TH.double()
    if wire.bits == 16:
        return BF16_HALF_ULP * values.abs()
    if wire.is_static:
        assert scale_D is not None
        bound = BF16_HALF_ULP * values.abs()  # outliers travel as bf16
        body = slice(None) if constants.body_index is None else constants.body_index
        bound[:, body] = scale_D.double() / 2
        return bound
    parts = []
    for group in values.split(wire.group_size, dim=1):
        peak = group.abs().amax(dim=1, keepdim=True)
        step = peak / (8 if wire.bits == 4 else 127) * (1 + BF16_HALF_ULP)
        # 4 bits: the signed peak has code -8, so a value of the other sign beyond 7.5 steps is clamped by up to a step
        far = (group.abs() > 7 * step) if wire.bits == 4 else torch.zeros_like(group, dtype=torch.bool)
        parts.append(torch.where(far, step, step / 2))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("ending", ["", ":one-stage"])
@pytest.mark.parametrize("name", ["bf16", "int8-group", "int4-group", "int4", "int4-random", "int4-outlier"])
@pytest.mark.parametrize("seed", range(3))
def test_errors_stay_within_the_steps(name: str, ending: str, seed: int) -> None:
    scheme = parse_scheme(name + ending)
    generator = torch.Generator().manual_seed(seed)
    width = (torch.randn(HIDDEN, generator=generator)).exp()  # features of very different ranges
    partials = torch.randn(RANKS, TOKENS, HIDDEN, generator=generator) * width.clamp_max(4.0)
    constants = constants_from_statistics(scheme, "here", statistics(partials))
    context = ParallelContext.virtual_ranks(RANKS)
    result = build_all_reduce(context, scheme, HIDDEN, constants)(partials).double()

    exact = partials.double().sum(dim=0)
    reduce_scale, gather_scale = constants.reduce_scale_RD, constants.gather_scale_1D
    bound = torch.full_like(exact, FP32_SUM)
    for rank in range(RANKS):
        scale = None if reduce_scale is None else reduce_scale[rank]
        bound += bound_of(scheme.reduce_stage, partials[rank], scale, constants)
    if scheme.gather_stage is not None:
        # the sum that is encoded may itself be off by the bound so far: its step may be larger by as much
        worst = exact.abs() + bound
        gather = None if gather_scale is None else gather_scale[0]
        bound = bound + bound_of(scheme.gather_stage, worst, gather, constants)
        if scheme.gather_stage.group_size and scheme.gather_stage.bits == 4:
            bound = bound + bound_of(scheme.gather_stage, worst, gather, constants)  # any of them may be the far one
    error = (result - exact).abs()
    assert (error <= bound).all(), f"{((error / bound).max()):.3f} times the bound"
    # a scale that is dropped, doubled or taken from another rank would leave the bound or fall far below it
    assert (error / bound).mean() > 0.03
