"""StepObserver: the static step of every feature that loses least, in squared error, at each number of bits."""

from __future__ import annotations

import torch

# Shapes: L rows of values (ranks, or the sum), T tokens of one sequence, H hidden features, N bins, B = 7 numbers of
# bits, S steps that are tried.

#: The numbers of bits that steps are found for.
BITS = (2, 3, 4, 5, 6, 7, 8)
#: Magnitudes are counted in bins a quarter of an octave wide, from 2^-24 to below 2^20.
BINS_OF_OCTAVE, LOWEST_OCTAVE, OCTAVES = 4, -24, 44
BINS = BINS_OF_OCTAVE * OCTAVES
#: So many bins below the largest magnitude seen: ranges that are tried.
TRIED = 6 * BINS_OF_OCTAVE


class StepObserver:
    """Counts magnitudes, each token weighing 1 over its mean square, so that no few massive tokens decide."""

    def __init__(self) -> None:
        self.counts_LHN: torch.Tensor | None = None

    def update(self, values_LTH: torch.Tensor, weight_T: torch.Tensor) -> None:
        """Takes in all tokens of one sequence."""
        rows, _, hidden = values_LTH.shape
        if self.counts_LHN is None:
            self.counts_LHN = torch.zeros(rows, hidden, BINS, device=values_LTH.device)
        octave_LTH = torch.log2(values_LTH.float().abs().clamp_min(2.0**LOWEST_OCTAVE)) - LOWEST_OCTAVE
        bin_LHT = (octave_LTH * BINS_OF_OCTAVE).floor_().clamp_(0, BINS - 1).long().transpose(1, 2)
        self.counts_LHN.scatter_add_(2, bin_LHT, weight_T.float().expand(rows, hidden, -1).contiguous())

    def steps(self) -> torch.Tensor:
        """FP32 `[B, L, H]`: of symmetric integers of 2 to 8 bits (`BITS`), clamped beyond their largest code."""
        assert self.counts_LHN is not None
        return torch.stack([torch.stack([_best_step(row, bits) for row in self.counts_LHN]) for bits in BITS])


def _best_step(counts_HN: torch.Tensor, bits: int) -> torch.Tensor:
    """FP32 `[H]`. Values stand in the middle of their bins; those below half a step are lost, those beyond clamped."""
    device = counts_HN.device
    number_N = torch.arange(BINS, device=device)
    value_N = torch.exp2((number_N + 0.5) / BINS_OF_OCTAVE + LOWEST_OCTAVE)
    largest_H = torch.where(counts_HN > 0, number_N, 0).amax(dim=1)
    largest_code = 2.0 ** (bits - 1) - 1
    best_H = torch.full(largest_H.shape, torch.inf, device=device)
    step_H = torch.zeros_like(best_H)
    for below in range(TRIED):
        # the upper end of a bin becomes the largest code
        step = torch.exp2((largest_H + 1 - below) / BINS_OF_OCTAVE + LOWEST_OCTAVE) / largest_code
        inside = torch.minimum(step[:, None].square() / 12, value_N.square())
        error_HN = torch.where(value_N < step[:, None] / 2, value_N.square(), inside)
        beyond = (value_N - largest_code * step[:, None]).clamp_min(0.0)
        error_H = (counts_HN * (error_HN + beyond.square())).sum(dim=1)
        better = error_H < best_H
        best_H, step_H = torch.where(better, error_H, best_H), torch.where(better, step, step_H)
    return step_H
