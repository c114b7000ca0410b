"""RangeObserver: running value ranges of partial sums and of their sum, updated once per calibration sequence."""

from __future__ import annotations

import torch

from megatron_lowbit.comm.all_reduce import AllReduce

# Shapes: L ranks living in this process, T tokens of one sequence, H hidden features.

EMA_FACTOR = 0.01


class RangeObserver:
    """Exponential moving minimum and maximum per row and feature (paper section 3.1).

    The paper's factor is 0.01; `max(0.01, 1/n)` makes the first hundred sequences count equally, where a plain 0.01
    would leave the ranges near those of the first sequence.
    """

    def __init__(self) -> None:
        self.sequences = 0
        self.minimum: torch.Tensor | None = None
        self.maximum: torch.Tensor | None = None

    def update(self, values_LTH: torch.Tensor) -> None:
        """Takes in all tokens of one sequence; FP32 statistics `[L, H]`."""
        minimum_LH = values_LTH.amin(dim=1).float()
        maximum_LH = values_LTH.amax(dim=1).float()
        self.sequences += 1
        if self.minimum is None or self.maximum is None:
            self.minimum, self.maximum = minimum_LH, maximum_LH
            return
        factor = max(EMA_FACTOR, 1.0 / self.sequences)
        self.minimum.lerp_(minimum_LH, factor)
        self.maximum.lerp_(maximum_LH, factor)


class ObservingAllReduce:
    """Passes the exact sum on and records what went through: calibration is the same model with these in place."""

    def __init__(self, exact: AllReduce) -> None:
        self._exact = exact
        self.partial = RangeObserver()
        self.sum = RangeObserver()

    def __call__(self, partial_LTH: torch.Tensor, add_to_TH: torch.Tensor | None = None) -> torch.Tensor:
        full_TH = self._exact(partial_LTH)
        self.partial.update(partial_LTH)
        self.sum.update(full_TH.unsqueeze(0))
        return full_TH if add_to_TH is None else add_to_TH.add_(full_TH)
