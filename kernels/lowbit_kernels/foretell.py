"""What goes with the codec where a predictor foretells or a loop is closed: `Feedback`; `Composed` is its definition.

A predictor's products are of whole numbers so small that FP32 products and sums of them are exact in any order
(|sums| < 2^24), so integer instructions give the same bits.

Legend: T tokens, H hidden features, K numbers between a predictor's two products, I inputs and O outputs of a product,
R ranks, B bytes of a packet row.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast

import torch
from torch import Tensor

from lowbit_kernels.backends import Backend
from lowbit_kernels.layout import PacketLayout

#: Codes lie within +- this; so do coefficients of one byte.
LARGEST_CODE = 127
_OUTPUTS_OF_TILE = 16


@dataclass(frozen=True)
class Coefficients:
    """A matrix of whole numbers that rows of codes are multiplied with.

    values_IO: int8 within +-127, or int16. Other forms are made when they are first asked for, and kept.
    """

    values_IO: Tensor

    @cached_property
    def floats_IO(self) -> Tensor:
        """FP32."""
        return self.values_IO.float()

    @property
    def width(self) -> int:
        """Bytes of a coefficient in `packed`, and of a code it is multiplied with."""
        return self.values_IO.element_size()

    @cached_property
    def packed(self) -> Tensor:
        """As csrc/products.h reads it: uint8 `[tiles of 16 outputs, 4 / width inputs each, 64 bytes]`, 0 at the ends.

        The 64 bytes hold 4 for each output: 4 inputs' coefficients plus 128, or 2 as they are.
        """
        assert self.values_IO.dtype in (torch.int8, torch.int16), self.values_IO.dtype
        inputs, outputs = self.values_IO.shape
        together = 4 // self.width
        chunks, tiles = -(-inputs // together), -(-outputs // _OUTPUTS_OF_TILE)
        padded = self.values_IO.new_zeros(chunks * together, tiles * _OUTPUTS_OF_TILE)
        padded[:inputs, :outputs] = self.values_IO
        packed = padded.view(chunks, together, tiles, _OUTPUTS_OF_TILE).permute(2, 0, 3, 1).contiguous()
        packed = packed.view(torch.uint8).view(tiles, chunks, 64)
        return packed ^ 128 if self.width == 1 else packed  # a byte plus 128


@dataclass(frozen=True)
class Share:
    """What is foretold of values `[T, H]`: codes, int8 `[T, K]`, times a matrix `[K, H]`, times FP32 `scale_H`."""

    codes_TK: Tensor
    coefficients: Coefficients
    scale_H: Tensor

    def values(self) -> Tensor:
        """FP32 `[T, H]`, by a matrix product."""
        return (self.codes_TK.float() @ self.coefficients.floats_IO).mul_(self.scale_H)


class Feedback(Protocol):
    """What `get_feedback` returns. `Composed` holds the contract; static arguments are those of the codec's functions.

    Bits of NaN that stay with an encoder (`missed_TH`, `owed_TH`) are not defined: the next packet has but one.
    """

    def foretell_codes(
        self, input_TH: Tensor, input_scale_H: Tensor, first: Coefficients, offset_K: Tensor, factor_K: Tensor
    ) -> Tensor: ...

    def encode_feedback(
        self,
        x_TH: Tensor,
        layout: PacketLayout,
        packet_TB: Tensor,
        share: Share | None,
        missed_TH: Tensor | None,
        inverse_scale: Tensor | None = None,
        scale: Tensor | None = None,
        body_index: Tensor | None = None,
        outlier_index: Tensor | None = None,
        minimum: Tensor | None = None,
    ) -> None: ...

    def requantize_feedback(
        self,
        packets_RTB: Tensor | Sequence[Tensor],
        layout: PacketLayout,
        packet_TB: Tensor,
        gather_layout: PacketLayout,
        owed_TH: Tensor,
        scale_RH: Tensor | None = None,
        body_index: Tensor | None = None,
        outlier_index: Tensor | None = None,
        minimum_RH: Tensor | None = None,
        *,
        gather_inverse_scale: Tensor | None = None,
        gather_scale: Tensor | None = None,
        gather_body_index: Tensor | None = None,
        gather_outlier_index: Tensor | None = None,
        gather_minimum: Tensor | None = None,
    ) -> None: ...

    def decode_foretold(
        self,
        packet_TB: Tensor,
        layout: PacketLayout,
        out_TH: Tensor,
        share: Share,
        scale: Tensor | None = None,
        body_index: Tensor | None = None,
        outlier_index: Tensor | None = None,
        minimum: Tensor | None = None,
    ) -> None: ...


def foretell_codes(
    input_TH: Tensor, input_scale_H: Tensor, first: Coefficients, offset_K: Tensor, factor_K: Tensor
) -> Tensor:
    """Codes int8 `[T, K]` of what a predictor reads, fp32 or bf16 `[T, H]`.

    Inputs become whole codes by `input_scale_H` (NaN becomes 0, the rest is kept within +-127); their products with
    `first` (int8 `[H, K]`) plus `offset_K`, whole numbers, times `factor_K`, round to codes again.
    """
    scaled = torch.nan_to_num(input_TH.float() * input_scale_H, nan=0.0)
    inputs = scaled.round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
    sums = (inputs @ first.floats_IO).add_(offset_K)
    return sums.mul_(factor_K).round_().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)


def unsent(x_TH: Tensor, share: Share | None, missed_TH: Tensor | None) -> Tensor:
    """What is encoded: FP32 `x - share + missed`, in this order, of what is given; bf16 where nothing is."""
    if share is not None:
        x_TH = x_TH.float() - share.values()
    if missed_TH is not None:
        x_TH = x_TH.float() + missed_TH
    return x_TH


@dataclass(frozen=True)
class Composed:
    """The codec of any backend, and torch between its calls."""

    codec: Backend

    foretell_codes = staticmethod(foretell_codes)

    def encode_feedback(
        self,
        x_TH: Tensor,
        layout: PacketLayout,
        packet_TB: Tensor,
        share: Share | None,
        missed_TH: Tensor | None,
        inverse_scale: Tensor | None = None,
        scale: Tensor | None = None,
        body_index: Tensor | None = None,
        outlier_index: Tensor | None = None,
        minimum: Tensor | None = None,
    ) -> None:
        """`encode` of what is `unsent`; `missed_TH` (FP32) becomes what the packet misses of that."""
        value_TH = unsent(x_TH, share, missed_TH)
        self.codec.encode(value_TH, layout, packet_TB, inverse_scale, body_index, outlier_index, minimum)
        if missed_TH is not None:
            self._keep_missed(value_TH, packet_TB, layout, missed_TH, scale, body_index, outlier_index, minimum)

    def requantize_feedback(
        self,
        packets_RTB: Tensor | Sequence[Tensor],
        layout: PacketLayout,
        packet_TB: Tensor,
        gather_layout: PacketLayout,
        owed_TH: Tensor,
        scale_RH: Tensor | None = None,
        body_index: Tensor | None = None,
        outlier_index: Tensor | None = None,
        minimum_RH: Tensor | None = None,
        *,
        gather_inverse_scale: Tensor | None = None,
        gather_scale: Tensor | None = None,
        gather_body_index: Tensor | None = None,
        gather_outlier_index: Tensor | None = None,
        gather_minimum: Tensor | None = None,
    ) -> None:
        """`requantize` of the sum plus `owed_TH` (FP32), which becomes what the packet misses of that."""
        sum_TH = torch.empty(owed_TH.shape, device=owed_TH.device)
        self.codec.decode_sum(packets_RTB, layout, sum_TH, scale_RH, body_index, outlier_index, minimum_RH)
        sum_TH += owed_TH
        static = gather_body_index, gather_outlier_index, gather_minimum
        self.codec.encode(sum_TH, gather_layout, packet_TB, gather_inverse_scale, *static)
        self._keep_missed(sum_TH, packet_TB, gather_layout, owed_TH, gather_scale, *static)

    def decode_foretold(
        self,
        packet_TB: Tensor,
        layout: PacketLayout,
        out_TH: Tensor,
        share: Share,
        scale: Tensor | None = None,
        body_index: Tensor | None = None,
        outlier_index: Tensor | None = None,
        minimum: Tensor | None = None,
    ) -> None:
        """Adds a packet's values, then what was foretold, to FP32 `out_TH`."""
        self.codec.decode(packet_TB, layout, out_TH, scale, body_index, outlier_index, minimum, add=True)
        out_TH += share.values()

    def _keep_missed(
        self,
        value_TH: Tensor,
        packet_TB: Tensor,
        layout: PacketLayout,
        missed_TH: Tensor,
        scale: Tensor | None,
        body_index: Tensor | None,
        outlier_index: Tensor | None,
        minimum: Tensor | None,
    ) -> None:
        arrived_TH = torch.empty(missed_TH.shape, device=missed_TH.device)
        self.codec.decode(packet_TB, layout, arrived_TH, scale, body_index, outlier_index, minimum)
        torch.sub(value_TH, arrived_TH, out=missed_TH)


def get_feedback(codec: Backend) -> Feedback:
    """What goes with a codec from `get_backend`: compiled C with that, else `Composed`."""
    if codec.name == "cpu":
        return cast(Feedback, importlib.import_module("lowbit_kernels.cpu_foretell"))
    return Composed(codec)
