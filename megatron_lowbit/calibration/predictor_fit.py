"""Fitting predictors: second moments of inputs and partial sums, a ridge regression of low rank, whole coefficients."""

from __future__ import annotations

import torch

from megatron_lowbit.comm.predictor import EXACT_BELOW, LARGEST_CODE, Predictor

# Shapes: T tokens, H hidden features, I = H + 1 inputs (a constant 1 is the last), R ranks, O = R x H outputs, K rank.

#: Ridge, as a share of the mean input energy: enough that rare inputs get no wild coefficients.
RIDGE = 3e-3
#: Codes a root mean square of an input, and of a number in between: what lies beyond 127 codes is clamped.
INPUT_CODES, MIDDLE_CODES = 6.0, 16.0
#: Smallest root mean square of an input, as a share of the largest: features that never moved get no say.
SMALLEST_INPUT = 1e-4
#: Ranks whose coefficients give up precision for a sum of one byte, which is multiplied in half the time of two.
MOST_ADDED = 16


def token_weights(sum_TH: torch.Tensor) -> torch.Tensor:
    """FP32 `[T]`: 1 over the mean square of each token's sum."""
    return 1.0 / sum_TH.square().mean(dim=1).clamp_min(1e-12)


class MomentObserver:
    """Sums of input x input and input x partial over tokens, each token weighted by 1 over its sum's mean square.

    Without weights the few tokens with massive activations would be all that is fitted.
    """

    def __init__(self) -> None:
        self.inputs_II: torch.Tensor | None = None
        self.cross_LIH: torch.Tensor | None = None
        self.weight = 0.0

    def update(self, input_TH: torch.Tensor, partial_LTH: torch.Tensor, sum_TH: torch.Tensor) -> None:
        """Takes in the tokens of one sequence; partials of the L ranks in this process."""
        weight_T1 = token_weights(sum_TH)[:, None]
        ones = torch.ones(input_TH.shape[0], 1, device=input_TH.device)
        input_TI = torch.cat((input_TH.float(), ones), dim=1)
        weighted_IT = (input_TI * weight_T1).T
        inputs_II = weighted_IT @ input_TI
        cross_LIH = torch.stack([weighted_IT @ partial_TH.float() for partial_TH in partial_LTH])
        self.weight += float(weight_T1.sum())
        if self.inputs_II is None or self.cross_LIH is None:
            self.inputs_II, self.cross_LIH = inputs_II, cross_LIH
        else:
            self.inputs_II += inputs_II
            self.cross_LIH += cross_LIH


def fit_predictor(inputs_II: torch.Tensor, cross_RIH: torch.Tensor, weight: float, rank: int) -> Predictor:
    """The predictor of rank `rank` (or less, where H is smaller) with least weighted squared error, and a ridge.

    Reduced-rank regression: the full ridge solution, projected on the outputs' directions of most explained energy.
    """
    ranks, width, hidden = cross_RIH.shape
    rank = min(rank, hidden)
    energy_I = (inputs_II.diagonal().double() / weight).clamp_min(0.0)
    gram = inputs_II.double() / weight
    gram += torch.eye(width, dtype=torch.float64) * (energy_I.mean() * RIDGE)
    cross_IO = cross_RIH.permute(1, 0, 2).reshape(width, ranks * hidden).double() / weight
    factor = torch.linalg.cholesky(gram)
    whitened_IO = torch.linalg.solve_triangular(factor, cross_IO, upper=False)
    # left singular vectors from the small I x I product; the right ones follow
    vectors = torch.linalg.eigh(whitened_IO @ whitened_IO.T).eigenvectors[:, -rank:].flip(-1)
    second_KO = vectors.T @ whitened_IO
    first_IK = torch.linalg.solve_triangular(factor.T, vectors, upper=True)
    return whole_numbers(first_IK, second_KO.reshape(-1, ranks, hidden), gram, energy_I)


def whole_numbers(
    first_IK: torch.Tensor, second_KRH: torch.Tensor, gram_II: torch.Tensor, energy_I: torch.Tensor
) -> Predictor:
    """The predictor of these coefficients in whole numbers; FP64 in."""
    energy_H = energy_I[:-1]
    rms_H = energy_H.sqrt().clamp_min(energy_H.max().sqrt() * SMALLEST_INPUT).clamp_min(1e-30)
    input_scale_H = INPUT_CODES / rms_H
    scaled_HK = first_IK[:-1] / input_scale_H[:, None]  # a coefficient for each code
    # the largest coefficient is 127 unless a sum could leave the exact range; half of it is kept for the offset
    step_K = torch.maximum(
        scaled_HK.abs().amax(dim=0) / LARGEST_CODE,
        scaled_HK.abs().sum(dim=0) * (2.2 * LARGEST_CODE / EXACT_BELOW),
    ).clamp_min(1e-30)
    first_HK = (scaled_HK / step_K).round().clamp(-LARGEST_CODE, LARGEST_CODE)
    offset_K = (first_IK[-1] / step_K).round().clamp(-EXACT_BELOW / 4, EXACT_BELOW / 4)
    middle_rms_K = (first_IK * (gram_II @ first_IK)).sum(dim=0).clamp_min(0.0).sqrt().clamp_min(1e-30)
    factor_K = step_K * MIDDLE_CODES / middle_rms_K
    worth_KRH = second_KRH * (middle_rms_K / MIDDLE_CODES)[:, None, None]
    second_RKH, scale_H = ranks_coefficients(worth_KRH.permute(1, 0, 2))
    return Predictor(
        input_scale_H.float(),
        first_HK.to(torch.int8),
        offset_K.float(),
        factor_K.float(),
        second_RKH,
        scale_H,
    )


def ranks_coefficients(worth_RKH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks' coefficients int8 `[R, K, H]` of these numbers, and FP32 `scale_H`, what one is worth.

    Those of up to MOST_ADDED ranks add up to one byte too. A sum is about sqrt(R) times as large where ranks are
    unlike, so that coefficients lose half a bit for R = 2 and one for R = 4: their rounding is then 0.012 of what is
    foretold.
    """
    ranks = worth_RKH.shape[0]
    largest_H = worth_RKH.abs().amax(dim=(0, 1)) / LARGEST_CODE
    if ranks <= MOST_ADDED:
        # each is rounded by up to half, and the scale in its eighth bit
        room = (LARGEST_CODE - ranks / 2) * (1 - 2.0**-8)
        largest_H = torch.maximum(largest_H, worth_RKH.sum(dim=0).abs().amax(dim=0) / room)
    scale_H = largest_H.clamp_min(1e-30).to(torch.bfloat16)
    second_RKH = (worth_RKH / scale_H.double()).round().clamp(-LARGEST_CODE, LARGEST_CODE)
    return second_RKH.to(torch.int8).contiguous(), scale_H.float()


def constant_predictor(mean_RH: torch.Tensor) -> Predictor:
    """The predictor of rank 1 that foretells these means of every rank's partials, whatever the input."""
    _, hidden = mean_RH.shape
    second_R1H, scale_H = ranks_coefficients(mean_RH.double()[:, None] / LARGEST_CODE)
    return Predictor(
        torch.ones(hidden),
        torch.zeros(hidden, 1, dtype=torch.int8),
        torch.full((1,), float(LARGEST_CODE)),
        torch.ones(1),
        second_R1H,
        scale_H,
    )
