"""SyncPointConstants: the static numbers a scheme needs at one sync point, derived from calibration before the run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Shapes: R ranks, H hidden features, K outlier features, D = H - K body features.

# Below this a scale would have no finite reciprocal or touch denormals, which some devices flush to zero.
SCALE_FLOOR = 2.0**-100


def bf16_scale(largest: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """FP32 tensor of static scales, `largest` over the largest code (7 of 4 bits), rounded to BF16.

    Floored above 0, so that a dead feature encodes to 0.
    """
    scale = (largest.float() / (2 ** (bits - 1) - 1)).to(torch.bfloat16).float()
    return scale.clamp_min(SCALE_FLOOR)


@dataclass(frozen=True)
class SyncPointConstants:
    """Index sets and scales of one sync point.

    body_index [D], outlier_index [K]: ascending feature numbers, int64; both None where nothing is set apart.
    reduce_scale_RD: FP32 scale of every rank's partial, gather_scale_1D: of the sum; body order, representable in
    BF16; None where the stage has no static scales.
    """

    body_index: torch.Tensor | None = None
    outlier_index: torch.Tensor | None = None
    reduce_scale_RD: torch.Tensor | None = None
    gather_scale_1D: torch.Tensor | None = None

    def to(self, device: torch.device) -> SyncPointConstants:
        """The same constants on another device."""
        return SyncPointConstants(*(None if part is None else part.to(device) for part in vars(self).values()))


NO_CONSTANTS = SyncPointConstants()
