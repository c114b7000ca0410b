"""What each sync point does to the sum that goes through it: error, drift of the residual, saturation by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.calibration.outliers import sync_point_constants
from megatron_lowbit.comm.all_reduce import AllReduce, build_all_reduce
from megatron_lowbit.comm.compensation import CompensatedAllReduce
from megatron_lowbit.comm.constants import NO_CONSTANTS
from megatron_lowbit.comm.saturation import SaturationCounter
from megatron_lowbit.comm.schemes import CommScheme, parse_scheme
from megatron_lowbit.comm.sync_point import JoiningAllReduce, Norm, SyncPoint, join_sum
from megatron_lowbit.comm.wire_format import WireFormat
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.weights import ModelWeights

# Shapes: L ranks living in this process, T tokens, H hidden features.

SMALLEST_ENERGY = 1e-30


@dataclass
class SyncPointErrors:
    """Sums over tokens, each token weighing alike.

    error: squared error of what joined the residual, over the square of what the exact sum of the same partials would
    have added. reduce_error: of the sum alone after the first stage; None where a scheme cannot run that stage alone.
    drift: squared error that all sync points up to this one left in the residual, over the residual's square.
    """

    tokens: int = 0
    error: float = 0.0
    reduce_error: float | None = None
    drift: float = 0.0
    saturation: SaturationCounter = field(default_factory=lambda: SaturationCounter(gather=SaturationCounter()))


@dataclass
class _Drift:
    """Of one forward pass."""

    error_TH: torch.Tensor | None = None


class _WatchedAllReduce:
    """Joins what the collective delivers, and notes how far that is from the exact sum."""

    def __init__(
        self,
        name: str,
        collective: AllReduce | CompensatedAllReduce,
        exact: AllReduce,
        first_stage: AllReduce | None,
        found: SyncPointErrors,
        drift: _Drift,
    ) -> None:
        self._name, self._collective, self._exact, self._first_stage = name, collective, exact, first_stage
        self._found, self._drift = found, drift

    def join(
        self,
        partial_LTH: torch.Tensor,
        residual_TH: torch.Tensor,
        bias: torch.Tensor | None,
        block_input_TH: torch.Tensor,
        state: object,
        post_norm: Norm | None,
    ) -> torch.Tensor:
        """The residual as the collective leaves it, to FP32 rounding."""
        exact_TH = self._exact(partial_LTH)
        point = SyncPoint(self._name, self._collective, post_norm)
        # onto zeros: beside a residual of thousands, small sums would show its rounding
        added_TH = point.add(partial_LTH, torch.zeros_like(residual_TH), bias, block_input_TH, state)
        meant_TH = join_sum(exact_TH, torch.zeros_like(residual_TH), bias, post_norm)
        residual_TH.add_(added_TH)
        error_TH = added_TH.sub_(meant_TH)
        if self._drift.error_TH is None:
            self._drift.error_TH = torch.zeros_like(residual_TH)
        self._drift.error_TH += error_TH
        found = self._found
        found.tokens += residual_TH.shape[0]
        found.error += _relative(error_TH, meant_TH)
        found.drift += _relative(self._drift.error_TH, residual_TH)
        if self._first_stage is not None:
            reduced_TH = self._first_stage(partial_LTH)
            found.reduce_error = (found.reduce_error or 0.0) + _relative(reduced_TH.sub_(exact_TH), exact_TH)
        return residual_TH


def sync_point_errors(
    weights: ModelWeights,
    scheme: CommScheme,
    calibration: CommCalibration | None,
    windows: Sequence[Sequence[int]],
    progress: Callable[[], None],
    backend: str = "auto",
) -> list[dict[str, object]]:
    """One row a sync point, in the order in which they are passed; the same on all ranks.

    Means over the tokens of all windows. `saturated_reduce`, `saturated_gather`: share of values clamped, None where a
    stage has no static range. progress: called after each forward pass.
    """
    context, hidden = weights.context, weights.config.hidden_size
    exact_scheme = parse_scheme("exact").for_dtype(weights.dtype)
    exact = build_all_reduce(context, exact_scheme, hidden, NO_CONSTANTS, backend)
    assert not isinstance(exact, CompensatedAllReduce)
    points = weights.config.sync_points
    found = {name: SyncPointErrors() for name in points}
    drift = _Drift()

    def watched(name: str, collective: AllReduce | CompensatedAllReduce) -> JoiningAllReduce:
        first_stage = _first_stage(weights, scheme.at(name, points), name, calibration, backend)
        return _WatchedAllReduce(name, collective, exact, first_stage, found[name], drift)

    counters = {name: errors.saturation for name, errors in found.items()}
    model = weights.build_with_scheme(scheme, calibration, backend, counters, wrap=watched)
    for window in windows:
        drift.error_TH = None
        model(TokenBatch.prompts([window], context.device))
        progress()
    shares = _saturated(weights, found)
    return [_row(scheme.at(name, points), name, errors, shares[name]) for name, errors in found.items()]


def _first_stage(
    weights: ModelWeights, scheme: CommScheme, name: str, calibration: CommCalibration | None, backend: str
) -> AllReduce | None:
    """The same scheme without its second quantisation; None where the stages cannot be told apart so."""
    if scheme.gather_stage is None or not scheme.portable:
        return None
    hidden = weights.config.hidden_size
    scheme = scheme.for_dtype(weights.dtype)
    constants = sync_point_constants(scheme, name, hidden, calibration, weights.context.device)
    alone = replace(scheme, gather_stage=None)
    collective = build_all_reduce(weights.context, alone, hidden, constants, backend, name)
    assert not isinstance(collective, CompensatedAllReduce)
    return collective


def _relative(error_TH: torch.Tensor, whole_TH: torch.Tensor) -> float:
    share_T = error_TH.square().sum(dim=1) / whole_TH.square().sum(dim=1).clamp_min(SMALLEST_ENERGY)
    return float(share_T.double().sum())


def _saturated(weights: ModelWeights, found: dict[str, SyncPointErrors]) -> dict[str, tuple[float, float]]:
    """Shares of both stages by sync point, over all ranks."""
    local = []
    for errors in found.values():
        reduce, gather = errors.saturation, errors.saturation.gather
        assert gather is not None
        local.append([reduce.saturated, reduce.values, gather.saturated, gather.values])
    ranks = weights.context.all_gather_json(local)
    totals = [[sum(column) for column in zip(*rows, strict=True)] for rows in zip(*ranks, strict=True)]
    pairs = [(first / max(values, 1), second / max(sums, 1)) for first, values, second, sums in totals]
    return dict(zip(found, pairs, strict=True))


def _row(scheme: CommScheme, name: str, errors: SyncPointErrors, saturated: tuple[float, float]) -> dict[str, object]:
    _, layer, _, kind = name.split(".")
    return {
        "part": "layers",
        "scheme": scheme.name,
        "sync_point": name,
        "layer": int(layer),
        "kind": kind,
        "error": errors.error / errors.tokens,
        "reduce_error": None if errors.reduce_error is None else errors.reduce_error / errors.tokens,
        "drift": errors.drift / errors.tokens,
        "saturated_reduce": saturated[0] if _has_static_range(scheme.reduce_stage) else None,
        "saturated_gather": saturated[1] if _has_static_range(scheme.gather_stage) else None,
        "tokens": errors.tokens,
    }


def _has_static_range(wire: WireFormat | None) -> bool:
    """True where values beyond a calibrated range are clamped, and counted."""
    return wire is not None and wire.is_static and not wire.group_size and not wire.has_static_minimum
