"""Triton: encode, in one launch. One program is one tile of one row; the first tile adds outliers and padding.

Legend: T tokens, H hidden features, K outliers, B bytes of a row.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.checks import check_encode
from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.pack import (
    EXPONENT,
    NAN_BF16_BITS,
    bf16_bits,
    check_alignment,
    code_of,
    group_scale,
    load_bits,
    one_nan,
    store_codes,
)

TILE = 512  # pairs of values
OUTLIER_TILE = tl.constexpr(128)


def encode(
    x_TH: Tensor,
    layout: PacketLayout,
    packet_TB: Tensor,
    inverse_scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
) -> None:
    """See `reference.encode`. Also ValueError for packet rows that are not aligned for their widest values."""
    check_encode(x_TH, layout, packet_TB, inverse_scale, body_index, outlier_index)
    check_alignment(packet_TB, layout)
    tokens = x_TH.shape[0]
    if tokens == 0:
        return
    is_bf16 = x_TH.dtype == torch.bfloat16
    # A tile of groups is two of them: they start at a whole byte even where a group is an odd number of nibbles.
    tile = triton.next_power_of_2(layout.group_size) if layout.group_size else TILE
    grid = (tokens, max(1, triton.cdiv(layout.body, 2 * (layout.group_size or TILE))))
    _encode[grid](
        x_TH.view(torch.int16 if is_bf16 else torch.int32),
        x_TH.stride(0),
        packet_TB,
        packet_TB.stride(0),
        inverse_scale,
        body_index,
        outlier_index,
        layout.body,
        layout.outliers,
        layout.group_size,
        layout.codes_nbytes,
        layout.scales_offset,
        layout.outliers_offset,
        layout.row_nbytes,
        IS_BF16=is_bf16,
        BITS=layout.bits,
        GROUPED=layout.group_size > 0,
        HAS_OUTLIERS=layout.outliers > 0,
        TILE=tile,
        num_warps=1 if tile <= 128 else 4,
        enable_fp_fusion=False,
    )


@triton.jit
def _encode(
    x_ptr: tl.tensor,
    x_stride: tl.tensor,
    packet_ptr: tl.tensor,
    packet_stride: tl.tensor,
    inverse_ptr: tl.tensor,
    body_index_ptr: tl.tensor,
    outlier_index_ptr: tl.tensor,
    body: tl.tensor,
    outliers: tl.tensor,
    group_size: tl.tensor,
    codes_nbytes: tl.tensor,
    scales_offset: tl.tensor,
    outliers_offset: tl.tensor,
    row_nbytes: tl.tensor,
    IS_BF16: tl.constexpr,
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    x_row = x_ptr + token * x_stride
    row = packet_ptr + token * packet_stride
    lane = tl.arange(0, TILE)
    if GROUPED:
        in_tile = lane < group_size
        pair = tile * group_size + lane
    else:
        in_tile = lane < TILE
        pair = tile * TILE + lane
    low_in = in_tile & (2 * pair < body)
    high_in = in_tile & (2 * pair + 1 < body)
    low_feature = 2 * pair
    high_feature = 2 * pair + 1
    if HAS_OUTLIERS:
        low_feature = tl.load(body_index_ptr + 2 * pair, mask=low_in, other=0)
        high_feature = tl.load(body_index_ptr + 2 * pair + 1, mask=high_in, other=0)
    low = load_bits(x_row + low_feature, low_in, IS_BF16)
    high = load_bits(x_row + high_feature, high_in, IS_BF16)

    if BITS == 32:
        values = row.to(tl.pointer_type(tl.int32))
        tl.store(values + 2 * pair, one_nan(low), mask=low_in)
        tl.store(values + 2 * pair + 1, one_nan(high), mask=high_in)
    elif BITS == 16:
        values = row.to(tl.pointer_type(tl.int16))
        tl.store(values + 2 * pair, bf16_bits(low).to(tl.int16), mask=low_in)
        tl.store(values + 2 * pair + 1, bf16_bits(high).to(tl.int16), mask=high_in)
    elif GROUPED:
        low_in_first = 2 * lane < group_size
        high_in_first = 2 * lane + 1 < group_size
        first = group_scale(low, high, low_in & low_in_first, high_in & high_in_first, BITS)
        second = group_scale(low, high, low_in & (low_in_first == 0), high_in & (high_in_first == 0), BITS)
        scales = (row + scales_offset).to(tl.pointer_type(tl.int16)) + 2 * tile
        tl.store(scales, first.to(tl.int16), mask=2 * tile * group_size < body)
        tl.store(scales + 1, second.to(tl.int16), mask=(2 * tile + 1) * group_size < body)
        LOWEST: tl.constexpr = -8 if BITS == 4 else -127
        HIGHEST: tl.constexpr = 7 if BITS == 4 else 127
        first_inverse = tl.div_rn(1.0, (first << 16).to(tl.float32, bitcast=True))
        second_inverse = tl.div_rn(1.0, (second << 16).to(tl.float32, bitcast=True))
        low_codes = code_of(
            low.to(tl.float32, bitcast=True) * tl.where(low_in_first, first_inverse, second_inverse), LOWEST, HIGHEST
        )
        high_codes = code_of(
            high.to(tl.float32, bitcast=True) * tl.where(high_in_first, first_inverse, second_inverse), LOWEST, HIGHEST
        )
        low_codes = tl.where(tl.where(low_in_first, first, second) == NAN_BF16_BITS, 0, low_codes)
        high_codes = tl.where(tl.where(high_in_first, first, second) == NAN_BF16_BITS, 0, high_codes)
        store_codes(row, pair, low_codes, high_codes, low_in, high_in, BITS)
    else:
        LIMIT: tl.constexpr = 7 if BITS == 4 else 127
        low_inverse = tl.load(inverse_ptr + 2 * pair, mask=low_in, other=1.0)
        high_inverse = tl.load(inverse_ptr + 2 * pair + 1, mask=high_in, other=1.0)
        low_codes = code_of(low.to(tl.float32, bitcast=True) * low_inverse, -LIMIT, LIMIT)
        high_codes = code_of(high.to(tl.float32, bitcast=True) * high_inverse, -LIMIT, LIMIT)
        low_codes = tl.where((low & EXPONENT) == EXPONENT, -LIMIT - 1, low_codes)
        high_codes = tl.where((high & EXPONENT) == EXPONENT, -LIMIT - 1, high_codes)
        store_codes(row, pair, low_codes, high_codes, low_in, high_in, BITS)

    if tile == 0:
        if HAS_OUTLIERS:
            sent = (row + outliers_offset).to(tl.pointer_type(tl.int16))
            for start in range(0, outliers, OUTLIER_TILE):
                k = start + tl.arange(0, OUTLIER_TILE)
                feature = tl.load(outlier_index_ptr + k, mask=k < outliers, other=0)
                bits = load_bits(x_row + feature, k < outliers, IS_BF16)
                tl.store(sent + k, bf16_bits(bits).to(tl.int16), mask=k < outliers)
        zero = tl.zeros((4,), tl.uint8)
        gap = codes_nbytes + tl.arange(0, 4)
        tl.store(row + gap, zero, mask=gap < scales_offset)
        end = outliers_offset + 2 * outliers + tl.arange(0, 4)
        tl.store(row + end, zero, mask=end < row_nbytes)
