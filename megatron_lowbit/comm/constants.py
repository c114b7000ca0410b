"""SyncPointConstants: the static numbers a scheme needs at one sync point, derived from calibration before the run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_lowbit.comm.predictor import Predictor
from megatron_lowbit.comm.wire_format import WireFormat

# Shapes: R ranks, H hidden features, K outlier features, D = H - K body features.

# Below this a scale would have no finite reciprocal or touch denormals, which some devices flush to zero.
SCALE_FLOOR = 2.0**-100
LARGEST_BF16 = torch.finfo(torch.bfloat16).max
# A feature's factor in a prescaled format is at least this share of the largest, or one that calibration hardly saw
# would take over the scale of its group when it moves.
SMALLEST_FACTOR = 2.0**-8


def bf16_scale(largest: torch.Tensor, largest_code: float = 7.0) -> torch.Tensor:
    """FP32 tensor of static scales, `largest` over the largest code (7 of 4 bits), rounded to BF16.

    Floored above 0, so that a dead feature encodes to 0.
    """
    scale = (largest.float() / largest_code).to(torch.bfloat16).float()
    return scale.clamp(SCALE_FLOOR, LARGEST_BF16)


def static_constants(
    wire: WireFormat,
    minimum: torch.Tensor,
    maximum: torch.Tensor,
    rms: torch.Tensor | None = None,
    fitted: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(scales, minimums) of a stage for values between `minimum` and `maximum`, each FP32 and representable in BF16.

    None for what `wire` has no use for. rms: root mean squares, where they are known. Symmetric codes and floats: the
    larger bound over the largest code. Asymmetric codes: both roundings go outwards, so that the whole range stays
    covered, even if it is narrow and far from 0.
    Prescaled formats: a factor is the square root of the feature's root mean square, so that wide features are evened
    out half-way; without that statistic, of the mean absolute bound `(|minimum| + |maximum|) / 2`. Rotated ones have
    one set for all ranks, from the root mean square over ranks of that: factors are multiplied back behind the sum.
    """
    if not wire.is_static:
        return None, None
    if wire.prescaled:
        typical = (minimum.abs().double() + maximum.abs().double()) / 2 if rms is None else rms.double()
        if wire.rotation:
            typical = typical.square().mean(dim=0, keepdim=True).sqrt()
        factor = typical.pow(wire.exponent).float()
        factor = torch.maximum(factor, SMALLEST_FACTOR * factor.amax(dim=-1, keepdim=True))
        return bf16_scale(factor, 1.0), None
    if wire.fitted:
        assert fitted is not None, wire
        return bf16_scale(fitted, 1.0), None
    if not wire.has_static_minimum:
        return bf16_scale(torch.maximum(minimum.abs(), maximum.abs()), wire.largest_code), None
    lowest = _bf16_towards(minimum.float(), -torch.inf)
    # in FP64, where the width of no range overflows
    scale = ((maximum.double() - lowest.double()) / wire.largest_code).float()
    return _bf16_towards(scale, torch.inf).clamp(SCALE_FLOOR, LARGEST_BF16), lowest


def _bf16_towards(values: torch.Tensor, direction: float) -> torch.Tensor:
    """FP32 values rounded to BF16 upwards or downwards, but never to Inf; zero as +0."""
    nearest = values.to(torch.bfloat16)
    missed = nearest.float() < values if direction > 0 else nearest.float() > values
    towards = torch.nextafter(nearest, torch.full_like(nearest, direction))
    return torch.where(missed, towards, nearest).float().clamp(-LARGEST_BF16, LARGEST_BF16) + 0.0


@dataclass(frozen=True)
class LoopLimits:
    """Typical magnitudes, from calibration, for carrying errors back through a norm.

    partial_rms_RH: of every rank's partials as they are encoded; sum_rms_H: of sums as they are encoded; ratio_R: by
    what the root mean square of a rank's row is multiplied to estimate that of the sum's. All FP32.
    """

    partial_rms_RH: torch.Tensor
    sum_rms_H: torch.Tensor
    ratio_R: torch.Tensor

    def to(self, device: torch.device) -> LoopLimits:
        return LoopLimits(*(tensor.to(device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class SyncPointConstants:
    """Index sets, scales and minimums of one sync point.

    body_index [D], outlier_index [K]: ascending feature numbers, int64; both None where nothing is set apart.
    reduce_scale_RD: FP32 scale of every rank's partial, gather_scale_1D: of the sum; in the order of the stage's body
    (a stage without outliers has all H features), representable in BF16; None where the stage has no static scales.
    reduce_minimum_RD, gather_minimum_1D: likewise, of asymmetric codes. A prescaled stage's factors are its scales; a
    rotated one has those of all H features, in one row for all ranks.
    predictor, limits: for schemes that foretell partial sums, and that close the loop over depth.
    """

    body_index: torch.Tensor | None = None
    outlier_index: torch.Tensor | None = None
    reduce_scale_RD: torch.Tensor | None = None
    gather_scale_1D: torch.Tensor | None = None
    reduce_minimum_RD: torch.Tensor | None = None
    gather_minimum_1D: torch.Tensor | None = None
    predictor: Predictor | None = None
    limits: LoopLimits | None = None

    def to(self, device: torch.device) -> SyncPointConstants:
        """The same constants on another device."""
        tensors = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, torch.Tensor)}
        limits = None if self.limits is None else self.limits.to(device)
        # a predictor stays as small as it is until a collective is built
        return replace(self, limits=limits, **tensors)  # type: ignore[arg-type]


NO_CONSTANTS = SyncPointConstants()
