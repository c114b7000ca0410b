"""From ranges to constants: which features stay BF16 and how large one step of each other feature is."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from megatron_lowbit.calibration.artifact import CommCalibration, SyncPointStatistics
from megatron_lowbit.calibration.moments import AGAIN
from megatron_lowbit.comm.constants import NO_CONSTANTS, SyncPointConstants, static_constants
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.comm.wire_format import WireFormat

# Shapes: R ranks, H hidden features, D body features, K outliers.


def aggregated_range(point: SyncPointStatistics) -> torch.Tensor:
    """`R_j = sum_i 2 max(|m_ij|, |M_ij|)` of every feature, FP64 `[H]` (paper section 3.1)."""
    return (2.0 * _largest(point.partial_min, point.partial_max).double()).sum(dim=0)


def select_outliers(range_H: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending int64 indices of the `count` largest ranges; of equal ranges the lower feature wins."""
    order = torch.argsort(range_H, descending=True, stable=True)
    return order[:count].sort().values


def random_outliers(hidden: int, count: int, name: str, seed: int) -> torch.Tensor:
    """Ascending int64 indices drawn without replacement: the same for all ranks, other for each sync point and seed."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(hidden, generator=generator)[:count].sort().values


def sync_point_constants(
    scheme: CommScheme, name: str, hidden: int, calibration: CommCalibration | None, device: torch.device
) -> SyncPointConstants:
    """What `scheme` needs at the sync point `name`; raises ValueError where calibration is needed and absent."""
    if not scheme.needs_calibration:
        sets = _index_sets(scheme, name, hidden, None)
        return sets if sets is NO_CONSTANTS else sets.to(device)
    if calibration is None:
        needs = "static scales" if scheme.has_static_stage else "calibrated outliers"
        raise ValueError(
            f"scheme {scheme.name!r} has {needs} and needs a calibration file; make one with "
            "`megatron-lowbit calibrate MODEL OUT.safetensors` and pass it with --calibration"
        )
    if name not in calibration.sync_points or calibration.hidden != hidden:
        raise ValueError(
            f"the calibration knows no sync point {name!r} of {hidden} features (it has "
            f"{len(calibration.sync_points)} of {calibration.hidden}); calibrate this model again"
        )
    return constants_from_statistics(scheme, name, calibration.sync_points[name]).to(device)


def constants_from_statistics(scheme: CommScheme, name: str, point: SyncPointStatistics) -> SyncPointConstants:
    """Index set, scales and minimums that `scheme` derives from the ranges of one sync point; none where it needs none.

    name: seeds the random index set of baselines, which differs from sync point to sync point.
    """
    sets = _index_sets(scheme, name, point.sum_min.shape[0], point)
    moments = point.moments
    if not scheme.portable:
        if moments is None:
            raise ValueError(
                f"scheme {scheme.name!r} needs a calibration with second moments, this file has ranges alone; {AGAIN}"
            )
        rank = scheme.predictor_rank
        predictor = moments.constant_predictor() if scheme.centred else moments.predictor_of_rank(rank)
        sets = replace(sets, predictor=predictor, limits=moments.limits(rank > 0))
    if not scheme.has_static_stage:
        return sets
    foretold = scheme.predictor_rank > 0

    def steps(wire: WireFormat, stage: int) -> torch.Tensor | None:
        if not wire.fitted:
            return None
        if moments is None:
            raise ValueError(f"scheme {scheme.name!r} needs fitted steps, this calibration has none; {AGAIN}")
        return moments.fitted_steps(wire.bits, foretold)[stage]

    partial_rms = None if moments is None else moments.rest_partial_rms if foretold else moments.partial_rms
    sum_rms = None if moments is None else moments.rest_sum_rms[None] if foretold else moments.sum_rms[None]
    bounds = point.partial_min, point.partial_max
    reduce_scale, reduce_minimum = _body_constants(
        scheme.reduce_stage, sets, *bounds, partial_rms, steps(scheme.reduce_stage, 0)
    )
    gather_scale, gather_minimum = None, None
    if scheme.gather_stage is not None:
        bounds = point.sum_min[None], point.sum_max[None]
        gather_steps = steps(scheme.gather_stage, 1)
        gather_scale, gather_minimum = _body_constants(scheme.gather_stage, sets, *bounds, sum_rms, gather_steps)
    return replace(
        sets,
        reduce_scale_RD=reduce_scale,
        gather_scale_1D=gather_scale,
        reduce_minimum_RD=reduce_minimum,
        gather_minimum_1D=gather_minimum,
    )


def _index_sets(scheme: CommScheme, name: str, hidden: int, point: SyncPointStatistics | None) -> SyncPointConstants:
    count = scheme.outlier_count(hidden)
    if not count:
        return NO_CONSTANTS
    if scheme.outlier_choice == "random":
        outliers = random_outliers(hidden, count, name, scheme.seed)
    else:
        assert point is not None
        outliers = select_outliers(aggregated_range(point), count)
    is_body = torch.ones(hidden, dtype=torch.bool)
    is_body[outliers] = False
    return SyncPointConstants(body_index=is_body.nonzero().flatten(), outlier_index=outliers)


def _body_constants(
    wire: WireFormat,
    sets: SyncPointConstants,
    minimum: torch.Tensor,
    maximum: torch.Tensor,
    rms: torch.Tensor | None,
    fitted: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Scales and minimums of the features that travel as codes, derived from theirs alone; all do where rotated."""
    if wire.outlier_divisor and sets.body_index is not None and not wire.rotation:
        minimum, maximum = minimum[..., sets.body_index], maximum[..., sets.body_index]
        rms = None if rms is None else rms[..., sets.body_index]
        fitted = None if fitted is None else fitted[..., sets.body_index]
    scale, lowest = static_constants(wire, minimum, maximum, rms, fitted)
    return (
        None if scale is None else scale.contiguous(),
        None if lowest is None else lowest.contiguous(),
    )


def _largest(minimum: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    return torch.maximum(minimum.abs(), maximum.abs())
