"""Predictor: what all ranks foretell of every rank's partial sums from the block's input, so that it need not travel.

A linear map of low rank, calibrated offline. It is computed in whole numbers so small that FP32 products and sums of
them, and integer instructions, are exact in any order: every rank gets the same bits, whatever its matrix kernels,
however tokens are sliced.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from lowbit_kernels.foretell import LARGEST_CODE, Coefficients, Feedback, Share, foretell_codes

# Shapes: T tokens, H hidden features, R ranks, K rank of the map.

#: Most ranks, whose coefficients together must fit two bytes.
MOST_RANKS = (2**15 - 1) // LARGEST_CODE
#: Sums of products stay below this: every whole number up to it is an FP32 value.
EXACT_BELOW = 2**24


@dataclass(frozen=True)
class Predictor:
    """`codes(h)` once a sync point, then `of_rank` and `of_sum`.

    input_scale_H: FP32, codes a unit of input. first_HK, second_RKH: coefficients, int8. offset_K, factor_K: FP32; the
    sums of the first product plus the (whole) offset, times the factor, are the codes in between. scale_H: FP32, what a
    unit of the second product's sums is worth. Raises ValueError where sums could leave the exact range.

    Codes of inputs, of the K numbers in between and the coefficients lie within +-127 (`LARGEST_CODE`). Where
    the ranks' coefficients add up to such numbers too, as fitted ones do, the sum's share takes half the time.
    """

    input_scale_H: torch.Tensor
    first_HK: torch.Tensor
    offset_K: torch.Tensor
    factor_K: torch.Tensor
    second_RKH: torch.Tensor
    scale_H: torch.Tensor

    def __post_init__(self) -> None:
        ranks, width, _ = self.second_RKH.shape
        if ranks > MOST_RANKS:
            raise ValueError(
                f"a predictor for {ranks} ranks has sums of coefficients beyond 2^15; at most {MOST_RANKS}"
            )
        largest_first = LARGEST_CODE * self.first_HK.float().abs().sum(dim=0) + self.offset_K.abs()
        if bool((largest_first >= EXACT_BELOW).any()) or ranks * width * LARGEST_CODE**2 >= EXACT_BELOW:
            raise ValueError(
                f"a predictor of rank {width} for {ranks} ranks and {self.first_HK.shape[0]} features has sums beyond "
                f"2^24, which FP32 would round; use a lower rank (ranks x rank x {LARGEST_CODE}^2 must stay below)"
            )

    def to(self, device: torch.device) -> PredictorOnDevice:
        """Ready for products on `device`."""
        return PredictorOnDevice(
            self.input_scale_H.to(device),
            Coefficients(self.first_HK.to(device)),
            self.offset_K.to(device),
            self.factor_K.to(device),
            tuple(Coefficients(second_KH) for second_KH in self.second_RKH.to(device)),
            Coefficients(self._total().to(device)),
            self.scale_H.to(device),
        )

    def _total(self) -> torch.Tensor:
        """The sum's coefficients `[K, H]`: of one byte where all fit, which takes half the instructions of two."""
        total_KH = self.second_RKH.sum(dim=0, dtype=torch.int16)
        fits = bool((total_KH.abs() <= LARGEST_CODE).all())
        return total_KH.to(torch.int8) if fits else total_KH

    def tensors(self) -> dict[str, torch.Tensor]:
        """By field name, for a file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class PredictorOnDevice:
    """The same, with coefficients of each rank and of the sum."""

    input_scale_H: torch.Tensor
    first: Coefficients
    offset_K: torch.Tensor
    factor_K: torch.Tensor
    of_ranks: tuple[Coefficients, ...]
    total: Coefficients
    scale_H: torch.Tensor

    def codes(self, block_input_TH: torch.Tensor, feedback: Feedback | None = None) -> torch.Tensor:
        """Codes int8 `[T, K]`, by torch or by `feedback`; a NaN counts as 0: what is wrong there travels by itself."""
        compute = foretell_codes if feedback is None else feedback.foretell_codes
        return compute(block_input_TH, self.input_scale_H, self.first, self.offset_K, self.factor_K)

    def share_of_rank(self, codes_TK: torch.Tensor, rank: int) -> Share:
        """What is foretold of one rank's partials."""
        return Share(codes_TK, self.of_ranks[rank], self.scale_H)

    def share_of_sum(self, codes_TK: torch.Tensor) -> Share:
        """What is foretold of the sum of all ranks."""
        return Share(codes_TK, self.total, self.scale_H)

    def of_rank(self, codes_TK: torch.Tensor, rank: int) -> torch.Tensor:
        """FP32 `[T, H]`: the partial foretold of one rank."""
        return self.share_of_rank(codes_TK, rank).values()

    def of_sum(self, codes_TK: torch.Tensor) -> torch.Tensor:
        """FP32 `[T, H]`: the sum foretold of all ranks."""
        return self.share_of_sum(codes_TK).values()
