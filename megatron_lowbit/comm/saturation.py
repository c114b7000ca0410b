"""SaturationCounter: how many communicated values fell outside their static range, by sync point."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Shapes: R senders, D body features, H hidden features, T tokens.


@dataclass
class SaturationCounter:
    """Counts over all encodings of one sync point in this process.

    values: all values looked at; saturated: finite ones at least half a step beyond the largest code, which the
    encoder clamps; non_finite: NaN and Inf. Counted on the device, read as integers afterwards. gather: where given,
    counts encodings of sums, which are then missing here.
    """

    values: int = 0
    gather: SaturationCounter | None = None
    _saturated: torch.Tensor | int = 0
    _non_finite: torch.Tensor | int = 0

    def count(self, x_TH: torch.Tensor, limit_H: torch.Tensor | None) -> None:
        """Takes in one message; `limit_H` is None for formats whose scales follow the values."""
        magnitude_TH = x_TH.abs()
        finite_TH = magnitude_TH < torch.inf  # False for NaN too
        self.values += x_TH.numel()
        self._non_finite = self._non_finite + (~finite_TH).sum()
        if limit_H is not None:
            self._saturated = self._saturated + (finite_TH & (magnitude_TH >= limit_H)).sum()

    def reset(self) -> None:
        self.values = 0
        self._saturated = self._non_finite = 0
        if self.gather is not None:
            self.gather.reset()

    @property
    def saturated(self) -> int:
        return int(self._saturated)

    @property
    def non_finite(self) -> int:
        return int(self._non_finite)


#: One counter a sync point, filled while a model that was built with it runs.
SaturationLog = dict[str, SaturationCounter]


def saturation_limits(
    scale_RD: torch.Tensor, body_index: torch.Tensor | None, hidden: int, steps: float
) -> torch.Tensor:
    """`[R, H]`: magnitude, `steps` times the scale, from which a value is clamped; infinite for BF16 features."""
    limit_RD = steps * scale_RD
    if body_index is None:
        return limit_RD
    limit_RH = scale_RD.new_full((scale_RD.shape[0], hidden), torch.inf)
    limit_RH[:, body_index] = limit_RD
    return limit_RH
