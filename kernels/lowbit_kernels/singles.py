"""Triton: packets to sums, value by value: any layout, any values in any order. Every function runs on the device.

What `quads.py` does for whole tiles, for rows that do not divide; and what both need: outliers, and where features are.

Legend: T tokens, K outliers, R ranks. F is a `rows.Format`.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from lowbit_kernels.group_scales import load_minimum, load_row_scale, load_scale, scale_value
from lowbit_kernels.pack import NAN_BITS, as_bits, as_float, level_value, small_float_value
from lowbit_kernels.rows import Source
from lowbit_kernels.sections import Row


@triton.jit
def load_code(row: tl.tensor, value: tl.tensor, mask: tl.tensor, at: Row, F: tl.constexpr) -> tl.tensor:
    """The codes (int32, not negative) of values number `value` of the body, from the packet row at `row`."""
    if F.bits == 8:
        code = _load_plane(row, value, mask, 8)
    elif F.bits >= 4:
        code = _load_plane(row, value, mask, 4)
        if F.bits == 5:
            code |= _load_plane(row + at.second_plane, value, mask, 1) << 4
        elif F.bits >= 6:
            code |= _load_plane(row + at.second_plane, value, mask, 2) << 4
        if F.bits == 7:
            code |= _load_plane(row + at.third_plane, value, mask, 1) << 6
    else:
        code = _load_plane(row, value, mask, 2)
        if F.bits == 3:
            code |= _load_plane(row + at.second_plane, value, mask, 1) << 2
    return code


@triton.jit
def _load_plane(plane: tl.tensor, value: tl.tensor, mask: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    IN_BYTE: tl.constexpr = 8 // WIDTH
    byte = tl.load(plane + value // IN_BYTE, mask=mask, other=0).to(tl.int32)
    return (byte >> (value % IN_BYTE * WIDTH)) & (2**WIDTH - 1)


@triton.jit
def trellis_place(
    row: tl.tensor, value: tl.tensor, code: tl.tensor, mask: tl.tensor, at: Row, F: tl.constexpr
) -> tl.tensor:
    """Which levels codes of a trellis stand for: the three codes before each in its group have a say."""
    FIRST: tl.constexpr = 4 if F.bits == 4 else 2
    place = value % at.group_size
    one = _load_plane(row, tl.maximum(value - 1, 0), mask & (place >= 1), FIRST)
    two = _load_plane(row, tl.maximum(value - 2, 0), mask & (place >= 2), FIRST)
    three = _load_plane(row, tl.maximum(value - 3, 0), mask & (place >= 3), FIRST)
    return (code >> 1) * 4 + ((code ^ two ^ three) & 1) * 2 + (one & 1)


@triton.jit
def load_value(
    row: tl.tensor,
    value: tl.tensor,
    mask: tl.tensor,
    scale: tl.tensor,
    minimum: tl.tensor,
    at: Row,
    F: tl.constexpr,
) -> tl.tensor:
    """fp32 values number `value` of the body, from the packet row at `row`.

    scale, minimum: pointers to the sender's static numbers; read where F has them.
    """
    if F.bits == 32:
        decoded = as_float(tl.load(row.to(tl.pointer_type(tl.int32)) + value, mask=mask, other=0))
    elif F.bits == 16:
        decoded = as_float(tl.load(row.to(tl.pointer_type(tl.uint16)) + value, mask=mask, other=0).to(tl.int32) << 16)
    else:
        code = load_code(row, value, mask, at, F)
        if F.is_int:
            decoded = ((code ^ F.half) - F.half).to(tl.float32)
        elif F.has_trellis:
            decoded = level_value(trellis_place(row, value, code, mask, at, F), F)
        elif F.has_levels:
            decoded = level_value(code, F)
        else:
            decoded = small_float_value(code, F.values == "e4m3")
        if F.grouped:
            row_scale = 0.0
            if F.scales == "e4m3":
                row_scale = load_row_scale(row, True, at)
            group = value // at.group_size
            decoded = decoded * scale_value(load_scale(row, group, mask, at, F), row_scale, F)
            if F.asymmetric:
                decoded = decoded + load_minimum(row, group, mask, at)
        if F.needs_static:
            decoded = decoded * tl.load(scale + value, mask=mask, other=0.0)
        if F.needs_minimum:
            decoded = decoded + tl.load(minimum + value, mask=mask, other=0.0)
        if F.lost_apart:
            decoded = as_float(tl.where(code == F.lost, NAN_BITS, as_bits(decoded)))
    return decoded


@triton.jit
def sum_values(
    source: Source,
    token: tl.tensor,
    value: tl.tensor,
    mask: tl.tensor,
    at: Row,
    F: tl.constexpr,
    RANKS: tl.constexpr,
) -> tl.tensor:
    """fp32 sums of all packets in rank order for values number `value` (any block) of the body of row `token`."""
    total = tl.full(value.shape, -0.0, tl.float32)  # -0.0 + v is v for every v, -0.0 included
    for r in tl.static_range(RANKS):
        row = source.packets[r] + token * source.strides[r]
        scale = row
        minimum = row
        if F.needs_static:
            scale = source.scale + r * source.scale_stride
        if F.needs_minimum:
            minimum = source.minimum + r * source.minimum_stride
        total += load_value(row, value, mask, scale, minimum, at, F)
    return total


@triton.jit
def sum_outliers(
    source: Source, token: tl.tensor, k: tl.tensor, mask: tl.tensor, at: Row, RANKS: tl.constexpr
) -> tl.tensor:
    """fp32 sums of all packets in rank order for outliers number `k` of row `token`; both may be blocks."""
    total = tl.full(k.shape, -0.0, tl.float32)
    for r in tl.static_range(RANKS):
        row = source.packets[r] + token * source.strides[r]
        section = (row + at.outliers_start).to(tl.pointer_type(tl.uint16))
        total += as_float(tl.load(section + k, mask=mask, other=0).to(tl.int32) << 16)
    return total


@triton.jit
def first_outlier(body_index: tl.tensor, start: tl.tensor, at: Row) -> tl.tensor:
    """How many outliers lie before value number `start` of the body: those between tiles, so that each has one tile.

    Features ascend, so the feature of a value exceeds its number by the outliers before it. K where `start` is behind
    the body, 0 where it is 0.
    """
    feature = tl.load(body_index + start, mask=start < at.body, other=0).to(tl.int32)
    before = tl.where(start < at.body, feature - start, at.outliers)
    return tl.where(start == 0, 0, before)


@triton.jit
def outliers_below(outlier_index: tl.tensor, feature: tl.tensor, mask: tl.tensor, at: Row) -> tl.tensor:
    """How many outliers (int32) are features below `feature` (any block): a binary search."""
    low = tl.zeros(feature.shape, tl.int32)
    length = at.outliers
    while length > 0:
        step = (length + 1) // 2
        tried = low + step - 1
        here = mask & (tried < at.outliers)
        below = here & (tl.load(outlier_index + tried, mask=here, other=0) < feature)
        low = tl.where(below, low + step, low)
        length = length - step
    return low
