"""Scores of next tokens gathered by scheme, and what they say with a confidence interval over windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_lowbit.scoring import TokenScores

# Shapes: N scored positions.

#: 97.5 % quantiles of Student's t distribution with 1 to 30 degrees of freedom.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NORMAL_QUANTILE = 1.95996


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval (Student's t); bounds are None where one value tells no spread."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        mean = math.fsum(values) / len(values)
        if len(values) < 2:
            return cls(mean, None, None)
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        half = t_quantile(len(values) - 1) * math.sqrt(variance / len(values))
        return cls(mean, mean - half, mean + half)

    def row(self, name: str) -> dict[str, float | None]:
        """As fields `name`, `name_low` and `name_high`."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t; beyond the table from its expansion around the normal one (error below 1e-3)."""
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[freedom - 1]
    z = NORMAL_QUANTILE
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


class ScoreBook:
    """Takes in scores of `evaluate` through its observer, and sums them up beside those of `exact`."""

    def __init__(self) -> None:
        self._parts: dict[str, list[TokenScores]] = {}

    def add(self, scheme: str, scores: TokenScores) -> None:
        """For `evaluate(observer=…)`."""
        self._parts.setdefault(scheme, []).append(scores)

    def summary(self, scheme: str, positions: range | None = None) -> dict[str, float | int | None]:
        """Fields of a row, at `positions` or all: `windows`, `tokens`, and with bounds, from means of windows, `kl`,
        `perplexity_change` (a share, paired) and `top1_agreement`.
        """
        found, base = self._all(scheme), self._all("exact")
        chosen_N = torch.ones(len(found.kl_N), dtype=torch.bool)
        if positions is not None:
            chosen_N = (found.positions_N >= positions.start) & (found.positions_N < positions.stop)
        assert torch.equal(found.windows_N, base.windows_N) and torch.equal(found.positions_N, base.positions_N)
        windows = found.windows_N[chosen_N].unique()

        def means(values_N: torch.Tensor) -> list[float]:
            return [float(values_N[chosen_N & (found.windows_N == window)].double().mean()) for window in windows]

        change = Interval.of(means(found.nll_N - base.nll_N))
        bounds = [None if bound is None else math.expm1(bound) for bound in (change.low, change.high)]
        return {
            **Interval.of(means(found.kl_N)).row("kl"),
            **Interval(math.expm1(change.mean), *bounds).row("perplexity_change"),
            **Interval.of(means(found.agreed_N)).row("top1_agreement"),
            "windows": len(windows),
            "tokens": int(chosen_N.sum()),
        }

    def _all(self, scheme: str) -> TokenScores:
        parts = self._parts[scheme]
        if len(parts) > 1:
            names = vars(parts[0])
            parts[:] = [TokenScores(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})]
        return parts[0]
