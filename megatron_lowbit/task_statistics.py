"""What answers under a scheme say beside those of the baseline to the same questions, with paired intervals."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_lowbit.quality_report_statistics import Interval

# Shapes: Q questions, C columns (schemes and what is measured of them), B resamples.

RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 250
_BOUNDS = (0.025, 0.975)


@dataclass(frozen=True)
class Resampled:
    """A mean over questions, and those of resamples (FP64 `[B]`): bootstrap, percentile intervals."""

    mean: float
    means_B: torch.Tensor

    @classmethod
    def average(cls, tasks: Sequence[Resampled]) -> Resampled:
        """Of tasks that count alike; their resamples must be independent."""
        mean = math.fsum(task.mean for task in tasks) / len(tasks)
        return cls(mean, torch.stack([task.means_B for task in tasks]).mean(0))

    def interval(self) -> Interval:
        return _interval(self.mean, self.means_B)

    def minus(self, base: Resampled) -> Interval:
        """Difference; paired, as both were resampled alike."""
        return _interval(self.mean - base.mean, self.means_B - base.means_B)

    def share_of(self, base: Resampled) -> Interval | None:
        """Ratio, None where the base is 0. In resamples 0 of 0 is 1, more of 0 infinite; a bound that is, is None."""
        if base.mean == 0:
            return None
        ratio_B = torch.where(self.means_B == base.means_B, 1.0, self.means_B / base.means_B)
        return _interval(self.mean / base.mean, ratio_B)


def _interval(mean: float, values_B: torch.Tensor) -> Interval:
    # no interpolation: between resamples with an infinite ratio it would give NaN
    low, high = values_B.quantile(values_B.new_tensor(_BOUNDS), interpolation="nearest").tolist()
    return Interval(mean, low if math.isfinite(low) else None, high if math.isfinite(high) else None)


def resample(columns: Mapping[Hashable, torch.Tensor], seed: int) -> dict[Hashable, Resampled]:
    """All columns (`[Q]`) resampled with the same questions, drawn with replacement; the same for a seed."""
    values_QC = torch.stack([column.double() for column in columns.values()], dim=1)
    questions = len(values_QC)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, RESAMPLES, _RESAMPLES_AT_ONCE):
        count = min(_RESAMPLES_AT_ONCE, RESAMPLES - start)
        drawn_BQ = torch.randint(questions, (count, questions), generator=generator)
        times_BQ = torch.zeros(count, questions, dtype=torch.float64)
        times_BQ.scatter_add_(1, drawn_BQ, torch.ones_like(times_BQ))
        parts.append(times_BQ @ values_QC / questions)
    means_BC = torch.cat(parts)
    return {
        name: Resampled(float(values_QC[:, index].mean()), means_BC[:, index]) for index, name in enumerate(columns)
    }


@dataclass(frozen=True)
class Flips:
    """Shares of questions whose answer is another than the baseline's: all, from right to wrong, from wrong to right.
    What is left of all went from one wrong answer to another."""

    flips: float
    right_to_wrong: float
    wrong_to_right: float

    @classmethod
    def between(
        cls, answers: Sequence[Hashable], right_Q: torch.Tensor, base: Sequence[Hashable], base_right_Q: torch.Tensor
    ) -> Flips:
        changed = sum(one != other for one, other in zip(answers, base, strict=True))
        lost, won = int((base_right_Q & ~right_Q).sum()), int((right_Q & ~base_right_Q).sum())
        return cls(changed / len(answers), lost / len(answers), won / len(answers))

    @classmethod
    def average(cls, tasks: Sequence[Flips]) -> Flips:
        columns = zip(*((task.flips, task.right_to_wrong, task.wrong_to_right) for task in tasks), strict=True)
        return cls(*(math.fsum(column) / len(tasks) for column in columns))
