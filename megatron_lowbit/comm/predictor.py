"""Predictor: what all ranks foretell of every rank's partial sums from the block's input, so that it need not travel.

A linear map of low rank, calibrated offline. It is computed in whole numbers small enough that FP32 products and sums
of them are exact in any order: every rank gets the same bits, whatever its matrix kernels, however tokens are sliced.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

# Shapes: T tokens, H hidden features, R ranks, K rank of the map.

#: Codes of inputs, of the K numbers in between and of the map's coefficients lie within +- this.
LARGEST_CODE = 127
#: Sums of products stay below this: every whole number up to it is an FP32 value.
EXACT_BELOW = 2**24


@dataclass(frozen=True)
class Predictor:
    """`codes(h)` once a sync point, then `of_rank` and `of_sum`.

    input_scale_H: FP32, codes a unit of input. first_HK, second_RKH: coefficients, int8. offset_K, factor_K: FP32; the
    sums of the first product plus the (whole) offset, times the factor, are the codes in between. scale_H: FP32, what a
    unit of the second product's sums is worth. Raises ValueError where sums could leave the exact range.
    """

    input_scale_H: torch.Tensor
    first_HK: torch.Tensor
    offset_K: torch.Tensor
    factor_K: torch.Tensor
    second_RKH: torch.Tensor
    scale_H: torch.Tensor

    def __post_init__(self) -> None:
        ranks, width, _ = self.second_RKH.shape
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
            self.first_HK.to(device).float(),
            self.offset_K.to(device),
            self.factor_K.to(device),
            self.second_RKH.to(device).float(),
            self.second_RKH.to(device).float().sum(dim=0),
            self.scale_H.to(device),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """By field name, for a file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class PredictorOnDevice:
    """The same with coefficients widened to FP32, and those of the sum beside them."""

    input_scale_H: torch.Tensor
    first_HK: torch.Tensor
    offset_K: torch.Tensor
    factor_K: torch.Tensor
    second_RKH: torch.Tensor
    total_KH: torch.Tensor
    scale_H: torch.Tensor

    def codes(self, block_input_TH: torch.Tensor) -> torch.Tensor:
        """FP32 whole numbers `[T, K]`; a row with NaN or Inf gives zeros: what is wrong there travels by itself."""
        scaled = torch.nan_to_num(block_input_TH.float() * self.input_scale_H, nan=0.0)
        inputs = scaled.round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
        sums = (inputs @ self.first_HK).add_(self.offset_K)
        return sums.mul_(self.factor_K).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)

    def of_rank(self, codes_TK: torch.Tensor, rank: int) -> torch.Tensor:
        """FP32 `[T, H]`: the partial foretold of one rank."""
        return (codes_TK @ self.second_RKH[rank]).mul_(self.scale_H)

    def of_sum(self, codes_TK: torch.Tensor) -> torch.Tensor:
        """FP32 `[T, H]`: the sum foretold of all ranks."""
        return (codes_TK @ self.total_KH).mul_(self.scale_H)
