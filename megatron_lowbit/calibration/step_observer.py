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


class StepObserver:
    """Counts magnitudes, each token weighing 1 over its mean square, so that no few massive tokens decide."""

    def __init__(self) -> None:
        self.counts_LHN: torch.Tensor | None = None

    def update(self, values_LTH: torch.Tensor, weight_T: torch.Tensor) -> None:
        """Takes in all tokens of one sequence."""
        rows, _, hidden = values_LTH.shape
        if self.counts_LHN is None:
            self.counts_LHN = torch.zeros(rows, hidden, BINS, device=values_LTH.device)
        magnitude_LTH = torch.nan_to_num(values_LTH.float().abs())  # what is not finite is reported elsewhere
        octave_LTH = torch.log2(magnitude_LTH.clamp_min(2.0**LOWEST_OCTAVE)) - LOWEST_OCTAVE
        bin_LHT = (octave_LTH * BINS_OF_OCTAVE).floor_().clamp_(0, BINS - 1).long().transpose(1, 2)
        weight_LHT = torch.nan_to_num(weight_T.float()).expand(rows, hidden, -1)
        self.counts_LHN.scatter_add_(2, bin_LHT, weight_LHT.contiguous())

    def steps(self) -> torch.Tensor:
        """FP32 `[B, L, H]`: of symmetric integers of 2 to 8 bits (`BITS`), clamped beyond their largest code.

        Tried are all steps whose largest code ends where a bin does; values stand in the middle of their bins.
        """
        assert self.counts_LHN is not None
        counts_LHN = self.counts_LHN.double()
        found = []
        for bits in BITS:
            step_S, error_SN = _errors(bits)
            error_LHS = counts_LHN @ error_SN.T.to(counts_LHN.device)
            found.append(step_S.to(counts_LHN.device)[error_LHS.argmin(dim=2)])
        return torch.stack(found).float()


def _errors(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP64 steps `[S]`, as many as bins, and the squared error of a value of each bin with them, `[S, N]`."""
    number_N = torch.arange(BINS, dtype=torch.float64)
    value_N = torch.exp2((number_N + 0.5) / BINS_OF_OCTAVE + LOWEST_OCTAVE)
    largest_code = 2.0 ** (bits - 1) - 1
    step_S = torch.exp2((number_N + 1) / BINS_OF_OCTAVE + LOWEST_OCTAVE) / largest_code
    step_S1 = step_S[:, None]
    # below half a step a value is lost, in between it is anywhere between two codes, beyond the last it is clamped
    inside_SN = torch.where(value_N < step_S1 / 2, value_N.square(), step_S1.square() / 12)
    beyond_SN = (value_N - largest_code * step_S1).clamp_min(0.0)
    return step_S, torch.where(beyond_SN > step_S1 / 2, beyond_SN.square(), inside_SN)
