"""Triton: values to packets, eight values of a row at a time. Every function runs on the device.

A unit of eight consecutive values is a whole number of bytes in every plane, whichever thread holds which of them: each
moves its code to its place, and the sum of these is the word. `put_units` is what kernels call;
`rows.encodes_in_units` says when they may. All that is told of a group, its scale and the reciprocal included, is
computed once for each unit.

F is a `rows.Format`. GROUP is the group size, or 0.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from lowbit_kernels.group_scales import (
    encoded_scale,
    group_key,
    group_minimum,
    is_lost,
    low_key,
    scale_value,
    store_minimum,
    store_scale,
    wanted_step,
)
from lowbit_kernels.pack import (
    ROUNDED_ZERO,
    as_bits,
    as_float,
    bf16_bits,
    is_finite,
    level_code,
    one_nan,
    rounded_code,
    small_float_code,
)
from lowbit_kernels.rows import Target
from lowbit_kernels.sections import Row


@triton.jit
def of_each_value(of_unit: tl.tensor) -> tl.tensor:
    """Blocks `[N]` of units to `[8 * N]` of their values."""
    return tl.reshape(tl.broadcast_to(of_unit[:, None], (of_unit.shape[0], 8)), (8 * of_unit.shape[0],))


@triton.jit
def group_keys(y: tl.tensor, inside: tl.tensor, F: tl.constexpr, GROUP: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The largest key and low key (the same where F has none) of the group of each unit, from fp32 bits `[8 * N]`.

    inside: `[N]`, which units are part of the body.
    """
    values = group_key(y, F)
    key = _largest_of_group(values, inside, GROUP)
    low = key
    if F.asymmetric:
        low = _largest_of_group(low_key(values), inside, GROUP)
    return key, low


@triton.jit
def _largest_of_group(keys: tl.tensor, inside: tl.tensor, GROUP: tl.constexpr) -> tl.tensor:
    UNITS: tl.constexpr = inside.shape[0]
    largest = tl.where(inside, tl.max(tl.reshape(keys, (UNITS, 8)), axis=1), 0)
    if GROUP > 8:
        GROUPS: tl.constexpr = 8 * UNITS // GROUP
        of_groups = tl.max(tl.reshape(largest, (GROUPS, GROUP // 8)), axis=1)
        largest = tl.reshape(tl.broadcast_to(of_groups[:, None], (GROUPS, GROUP // 8)), (UNITS,))
    return largest


@triton.jit
def load_static(
    target: Target, start: tl.tensor, at: Row, F: tl.constexpr, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Static reciprocals and minimums of values `start` to `start + TILE - 1` of the body, where F has them."""
    value = start + tl.arange(0, TILE)
    inverse_scale = 1.0
    minimum = 0.0
    if F.needs_static:
        inverse_scale = tl.load(target.inverse_scale + value, mask=value // F.unit < at.body // F.unit)
    if F.needs_minimum:
        minimum = tl.load(target.minimum + value, mask=value // F.unit < at.body // F.unit)
    return inverse_scale, minimum


@triton.jit
def largest_step(
    bits: tl.tensor, inverse_scale: tl.tensor, start: tl.tensor, at: Row, F: tl.constexpr, GROUP: tl.constexpr
) -> tl.tensor:
    """The largest wanted step (fp32 scalar, at least 0) among the finite groups of fp32 bits `[8 * N]`.

    start, inverse_scale: as for `put_units`.
    """
    unit = start // 8 + tl.arange(0, bits.shape[0] // 8)
    if F.prescaled:
        bits = as_bits(as_float(bits) * inverse_scale)
    key, low = group_keys(bits, 8 * unit < at.body, F, GROUP)
    steps = tl.where(is_lost(key, low, F), 0.0, tl.abs(wanted_step(key, low, F)))
    return tl.max(tl.where(8 * unit < at.body, steps, 0.0), axis=0)


@triton.jit
def store_row_scale(row: tl.tensor, raw: tl.tensor, at: Row) -> None:
    """Write the bf16 bits (int32 scalar) of the row scale into the packet row at `row`."""
    tl.store((row + at.row_scale).to(tl.pointer_type(tl.int16)), raw.to(tl.int16))


@triton.jit
def fill_gaps(row: tl.tensor, exists: tl.tensor, at: Row, F: tl.constexpr) -> None:
    """Write zeros where sections of the packet row at `row` do not meet, if it `exists`."""
    if not F.plain:
        if F.scales != "e8m0":
            tl.store(row + at.codes_end, tl.zeros((), tl.uint8), mask=exists & (at.codes_end < at.row_scale))
        if F.grouped:
            tl.store(row + at.scales_end, tl.zeros((), tl.uint8), mask=exists & (at.scales_end < at.minimums))


@triton.jit
def put_units(
    bits: tl.tensor,
    row: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    inverse_scale: tl.tensor,
    minimum: tl.tensor,
    row_scale: tl.tensor,
    at: Row,
    F: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Encode fp32 bits `[8 * N]` into the packet row at `row`: codes, group scales, minimums; or plain values.

    start: number of the first value in the body, a multiple of 8 and of GROUP. end: the number of values in the body,
    0 for nothing. inverse_scale, minimum: fp32 `[8 * N]`, static, and row_scale: fp32 scalar; read where F has them.
    """
    UNITS: tl.constexpr = bits.shape[0] // 8
    if F.plain:
        value = start + tl.arange(0, 8 * UNITS)
        if F.bits == 32:
            values = row.to(tl.pointer_type(tl.int32))
            tl.store(values + value, one_nan(as_float(bits)), mask=value // F.unit < end // F.unit)
        else:
            values = row.to(tl.pointer_type(tl.int16))
            tl.store(values + value, bf16_bits(bits).to(tl.int16), mask=value // F.unit < end // F.unit)
    else:
        unit = start // 8 + tl.arange(0, UNITS)
        inside = 8 * unit < end
        x = as_float(bits)
        if F.grouped:
            if F.prescaled:
                x = x * inverse_scale
            key, low = group_keys(as_bits(x), inside, F, GROUP)
            lost = is_lost(key, low, F)
            raw = encoded_scale(key, low, row_scale, F)
            inverse = tl.div_rn(1.0, scale_value(raw, row_scale, F))
            if F.asymmetric:
                x = x - of_each_value(as_float(group_minimum(low) << 16))
            codes = code_bits(x * of_each_value(inverse), F)
            group = 8 * unit // GROUP
            first = inside & (8 * unit % GROUP == 0)
            store_scale(row, group, raw, first, at, F)
            if F.asymmetric:
                store_minimum(row, group, low, lost, first, at)
        else:
            finite = is_finite(x)
            if F.asymmetric:
                x = x - minimum
            codes = tl.where(finite, code_bits(x * inverse_scale, F), _lost_code_bits(F))
            lost = unit < 0
        store_units(row, start, codes, lost, end, at, F)


@triton.jit
def code_bits(product: tl.tensor, F: tl.constexpr) -> tl.tensor:
    """Codes (int32) of scaled values as `store_units` takes them."""
    if F.is_int:
        bits = rounded_code(product, F.lowest, F.highest, F.bias)
    elif F.has_levels:
        bits = level_code(product, F)
    else:
        bits = small_float_code(product, F.values == "e4m3")
    return bits


@triton.jit
def _lost_code_bits(F: tl.constexpr) -> tl.tensor:
    """The code that means "not finite" as `store_units` takes it."""
    return ROUNDED_ZERO + (F.lost ^ F.bias) if F.is_int else F.lost


@triton.jit
def store_units(
    row: tl.tensor, start: tl.tensor, codes: tl.tensor, lost: tl.tensor, end: tl.tensor, at: Row, F: tl.constexpr
) -> None:
    """Write codes `[8 * N]` into the planes of the packet row at `row`; 0 for units that are `lost` (bool `[N]`).

    codes: as `code_bits` gives them. Integers still bear the bits of the rounding constant, and, where there is one
    plane only, are unsigned numbers: their sum in a word is right but for constants, which come off once for all.
    """
    if F.planes == 1:
        _store_plane(row, start, codes, lost, end, F.bits, F.word_base, F.word_flip, F.word_nbytes)
    else:
        FIRST: tl.constexpr = 4 if F.bits > 4 else 2
        SECOND: tl.constexpr = 2 if F.bits > 5 else 1
        _store_plane(row, start, codes & (2**FIRST - 1), lost, end, FIRST, 0, 0, F.word_nbytes)
        second = (codes >> FIRST) & (2**SECOND - 1)
        _store_plane(row + at.second_plane, start, second, lost, end, SECOND, 0, 0, F.word_nbytes)
        if F.bits == 7:
            _store_plane(row + at.third_plane, start, (codes >> 6) & 1, lost, end, 1, 0, 0, F.word_nbytes)


@triton.jit
def _store_plane(
    plane: tl.tensor,
    start: tl.tensor,
    codes: tl.tensor,
    lost: tl.tensor,
    end: tl.tensor,
    WIDTH: tl.constexpr,
    BASE: tl.constexpr,
    FLIP: tl.constexpr,
    WORD_NBYTES: tl.constexpr,
) -> None:
    """Write `WIDTH` bits of each code `[8 * N]`, in words of up to `WORD_NBYTES` bytes: a unit is one to four of them.

    The plane of a row that starts at a multiple of 2 or 4 does so too, but for planes of width 1, which need not.
    """
    NBITS: tl.constexpr = min(8 * WORD_NBYTES, 8 * WIDTH)
    KIND: tl.constexpr = tl.int32 if NBITS == 32 else tl.int16 if NBITS == 16 else tl.int8
    IN_WORD: tl.constexpr = NBITS // WIDTH
    WORDS: tl.constexpr = codes.shape[0] // IN_WORD
    place = tl.arange(0, codes.shape[0]) % IN_WORD * WIDTH
    words = (tl.sum(tl.reshape(codes << place, (WORDS, IN_WORD)), axis=1) - BASE) ^ FLIP
    if IN_WORD < 8:
        lost = tl.reshape(tl.broadcast_to(lost[:, None], (lost.shape[0], 8 // IN_WORD)), (WORDS,))
    word = start // IN_WORD + tl.arange(0, WORDS)
    words = tl.where(lost, 0, words).to(KIND)
    tl.store(plane.to(tl.pointer_type(KIND)) + word, words, mask=word < end // IN_WORD)
