"""From ranges to constants: which features stay BF16 and how large one INT4 step of each other feature is."""

from __future__ import annotations

import hashlib

import torch

from megatron_lowbit.calibration.artifact import CommCalibration, SyncPointStatistics
from megatron_lowbit.comm.constants import NO_CONSTANTS, SyncPointConstants, bf16_scale
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
        return NO_CONSTANTS
    if calibration is None:
        raise ValueError(
            f"scheme {scheme.name!r} has static scales and needs a calibration file; make one with "
            "`megatron-lowbit calibrate MODEL OUT.safetensors` and pass it with --calibration"
        )
    if name not in calibration.sync_points or calibration.hidden != hidden:
        raise ValueError(
            f"the calibration knows no sync point {name!r} of {hidden} features (it has "
            f"{len(calibration.sync_points)} of {calibration.hidden}); calibrate this model again"
        )
    return constants_from_statistics(scheme, name, calibration.sync_points[name]).to(device)


def constants_from_statistics(scheme: CommScheme, name: str, point: SyncPointStatistics) -> SyncPointConstants:
    """Index set and scales that `scheme` derives from the ranges of one sync point; none where it needs none.

    name: seeds the random index set of baselines, which differs from sync point to sync point.
    """
    if not scheme.needs_calibration:
        return NO_CONSTANTS
    hidden = point.sum_min.shape[0]
    count = scheme.reduce_stage.outlier_count(hidden)
    outliers = body = None
    if count:
        if scheme.outlier_choice == "random":
            outliers = random_outliers(hidden, count, name, scheme.seed)
        else:
            outliers = select_outliers(aggregated_range(point), count)
        is_body = torch.ones(hidden, dtype=torch.bool)
        is_body[outliers] = False
        body = is_body.nonzero().flatten()

    def body_scale(wire: WireFormat | None, minimum: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor | None:
        if wire is None or not wire.is_static:
            return None
        scale = bf16_scale(_largest(minimum, maximum), wire.bits)
        return (scale if body is None else scale[..., body]).contiguous()

    return SyncPointConstants(
        body_index=body,
        outlier_index=outliers,
        reduce_scale_RD=body_scale(scheme.reduce_stage, point.partial_min, point.partial_max),
        gather_scale_1D=body_scale(scheme.gather_stage, point.sum_min[None], point.sum_max[None]),
    )


def _largest(minimum: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    return torch.maximum(minimum.abs(), maximum.abs())
