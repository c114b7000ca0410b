"""Triton: packets to sums, four values of a row at a time. Every function runs on the device.

A thread takes four consecutive values: their codes are one word (at most two bytes more for further planes), they share
a group's scale, and their sums are one 16-byte store. `sum_quads` is what kernels call; `rows.decodes_in_quads` says
when they may. Words of all rows are loaded before the first one is used, so that many loads are under way.

Where a code of 4 or 8 bits is put below the exponent of a power of two, it is a float with one instruction, and another
one takes the power of two away: `Row.magic` is 2^23, and lower powers serve codes that lie further left in a word. It
is a run-time number because an instruction takes one immediate operand only, and the mask is that.

Legend: T tokens, R ranks. F is a `rows.Format`. GROUP is the group size, or 0.
"""

# Triton's tuples grow by addition: it knows no unpacking, and mypy no growth.
# mypy: allow-untyped-decorators, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from lowbit_kernels.group_scales import load_minimum, load_row_scale, load_scale, scale_value
from lowbit_kernels.pack import NAN_BITS, as_bits, as_float, level_value, small_float_value
from lowbit_kernels.rows import Source
from lowbit_kernels.sections import Row, end_of_row


@triton.jit
def join4(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Blocks `[N]` to one `[4 * N]` that holds a0 b0 c0 d0 a1 b1 ..., without moving anything between threads."""
    quads = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(quads, (4 * a.shape[0],))


@triton.jit
def load_quads(row: tl.tensor, quad: tl.tensor, mask: tl.tensor, at: Row, F: tl.constexpr) -> tl.tensor:
    """The codes of values `4 * quad` to `4 * quad + 3` of the packet row at `row`, in an int32: plane behind plane."""
    if F.bits == 8 and F.word_nbytes == 2:
        halves = row.to(tl.pointer_type(tl.uint16)) + 2 * quad
        words = tl.load(halves, mask=mask, eviction_policy="evict_first").to(tl.int32)
        words |= tl.load(halves + 1, mask=mask, eviction_policy="evict_first").to(tl.int32) << 16
    elif F.bits == 8:
        words = tl.load(row.to(tl.pointer_type(tl.int32)) + quad, mask=mask, eviction_policy="evict_first")
    elif F.bits >= 4:
        words = tl.load(row.to(tl.pointer_type(tl.uint16)) + quad, mask=mask, eviction_policy="evict_first").to(
            tl.int32
        )
        if F.bits >= 6:
            words |= tl.load(row + at.second_plane + quad, mask=mask, eviction_policy="evict_first").to(tl.int32) << 16
        if F.bits == 5:
            words |= _load_single_bits(row + at.second_plane, quad, mask) << 16
        elif F.bits == 7:
            words |= _load_single_bits(row + at.third_plane, quad, mask) << 24
    else:
        words = tl.load(row + quad, mask=mask, eviction_policy="evict_first").to(tl.int32)
        if F.bits == 3:
            words |= _load_single_bits(row + at.second_plane, quad, mask) << 8
    return words


@triton.jit
def _load_single_bits(plane: tl.tensor, quad: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Four bits of a plane of width 1."""
    both = tl.load(plane + quad // 2, mask=mask, eviction_policy="evict_first").to(tl.int32)
    return (both >> (4 * (quad % 2))) & 0xF


@triton.jit
def quad_value(words: tl.tensor, magic: tl.tensor, J: tl.constexpr, F: tl.constexpr) -> tl.tensor:
    """fp32 value, before any scale, of code J of each word. Codes that mean "not finite" are numbers here, too."""
    if F.is_int and (F.bits == 4 or F.bits == 8):
        PLACE: tl.constexpr = F.bits * J % 16
        POWER: tl.constexpr = 23 - PLACE
        half = words if F.bits * J < 16 else words >> 16
        bits = (half & ((2**F.bits - 1) << PLACE)) ^ ((magic - (PLACE << 23)) | (F.half << PLACE))
        value = as_float(bits) - (2.0**POWER + F.half)
    else:
        code = quad_code(words, J, F)
        if F.is_int:
            value = as_float((code ^ F.half) | magic) - (2.0**23 + F.half)
        elif F.has_levels:
            value = level_value(code, F)
        else:
            value = small_float_value(code, F.values == "e4m3")
    return value


@triton.jit
def quad_code(words: tl.tensor, J: tl.constexpr, F: tl.constexpr) -> tl.tensor:
    """Code J of each word, an int32 that is not negative."""
    if F.bits == 8:
        code = (words >> (8 * J)) & 0xFF
    elif F.bits >= 4:
        code = (words >> (4 * J)) & 0xF
        if F.bits == 5:
            code |= ((words >> (16 + J)) & 1) << 4
        if F.bits >= 6:
            code |= ((words >> (16 + 2 * J)) & 3) << 4
        if F.bits == 7:
            code |= ((words >> (24 + J)) & 1) << 6
    else:
        code = (words >> (2 * J)) & 3
        if F.bits == 3:
            code |= ((words >> (8 + J)) & 1) << 2
    return code


@triton.jit
def lost_quads(words: tl.tensor, F: tl.constexpr) -> tl.tensor:
    """Which codes of the words mean "not finite" (static scales): bits 3, 7, 11 and 15 are these flags.

    Codes of 4 bits are compared all at once: a nibble is 0 where neither it nor it plus 7 reaches bit 3.
    """
    if F.bits == 4:
        nibbles = words ^ (0x1111 * F.lost)
        flags = ~(((nibbles & 0x7777) + 0x7777) | nibbles)
    else:
        flags = tl.zeros_like(words)
        for J in tl.static_range(4):
            flags |= (quad_code(words, J, F) == F.lost).to(tl.int32) << (4 * J + 3)
    return flags


@triton.jit
def sum_quads(
    source: Source,
    token: tl.tensor,
    tokens: tl.tensor,
    start: tl.tensor,
    at: Row,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    QUADS: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Sums of all packets in rank order for rows `token` to `token + ROWS - 1`: a tuple of fp32 `[4 * QUADS]`.

    token: int64 scalar, masked at `tokens`. start: number of the first value in the body, a multiple of 4. Values
    behind the body, where nothing is loaded, are anything. NaNs have any bits.
    """
    value = start + tl.arange(0, 4 * QUADS)
    in_body = value // F.unit < at.body // F.unit
    totals = ()
    lost = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.full((4 * QUADS,), -0.0, tl.float32),)  # -0.0 + v is v for every v, -0.0 included
        lost = lost + (tl.zeros((QUADS,), tl.int32),)
    for r in tl.static_range(RANKS):
        loaded = ()
        for i in tl.static_range(ROWS):
            row = source.packets[r] + (token + i) * source.strides[r]
            end = end_of_row(at.body, token + i, tokens)
            if F.plain:
                loaded = loaded + (load_plain(row, value, value // F.unit < end // F.unit, F),)
            else:
                loaded = loaded + (_load_sections(row, start, end, at, F, GROUP, QUADS),)
        if F.needs_static:
            static_scale = tl.load(source.scale + r * source.scale_stride + value, mask=in_body)
        if F.needs_minimum:
            static_minimum = tl.load(source.minimum + r * source.minimum_stride + value, mask=in_body)
        new_totals = ()
        new_lost = ()
        for i in tl.static_range(ROWS):
            if F.plain:
                decoded = loaded[i]
            else:
                words, raw, row_scale, minimum = loaded[i]
                decoded = _decoded(words, raw, row_scale, minimum, at, F)
                if F.needs_static:
                    decoded = decoded * static_scale
                if F.needs_minimum:
                    decoded = decoded + static_minimum
                if F.lost_apart:
                    new_lost = new_lost + (lost[i] | lost_quads(words, F),)
            new_totals = new_totals + (totals[i] + decoded,)
        totals = new_totals
        if F.lost_apart:
            lost = new_lost
    if F.lost_apart:
        whole = ()
        for i in tl.static_range(ROWS):
            flags = lost[i]
            is_lost = join4(flags & 0x8, flags & 0x80, flags & 0x800, flags & 0x8000) != 0
            whole = whole + (as_float(tl.where(is_lost, NAN_BITS, as_bits(totals[i]))),)
        totals = whole
    return totals


@triton.jit
def load_plain(row: tl.tensor, value: tl.tensor, mask: tl.tensor, F: tl.constexpr) -> tl.tensor:
    """fp32 values number `value` of a packet row of plain values."""
    if F.bits == 32:
        pointer = row.to(tl.pointer_type(tl.int32)) + value
        bits = tl.load(pointer, mask=mask, eviction_policy="evict_first")
    else:
        pointer = row.to(tl.pointer_type(tl.uint16)) + value
        bits = tl.load(pointer, mask=mask, eviction_policy="evict_first").to(tl.int32) << 16
    return as_float(bits)


@triton.jit
def _load_sections(
    row: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    at: Row,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    QUADS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The words of a tile of a row, up to value `end`; scales of their groups as they travel, row scale, minimums.

    What a format does not have is a copy of the words, which nobody reads.
    """
    quad = start // 4 + tl.arange(0, QUADS)
    mask = 4 * quad < end
    words = load_quads(row, quad, mask, at, F)
    raw = words
    row_scale = words
    minimum = words
    if F.grouped:
        raw = load_scale(row, 4 * quad // GROUP, mask, at, F)
        if F.scales == "e4m3":
            row_scale = load_row_scale(row, end > 0, at)
        if F.asymmetric:
            minimum = load_minimum(row, 4 * quad // GROUP, mask, at)
    return words, raw, row_scale, minimum


@triton.jit
def _decoded(
    words: tl.tensor, raw: tl.tensor, row_scale: tl.tensor, minimum: tl.tensor, at: Row, F: tl.constexpr
) -> tl.tensor:
    """fp32 values `[4 * N]` of words `[N]`, with all that travels beside them."""
    v0 = quad_value(words, at.magic, 0, F)
    v1 = quad_value(words, at.magic, 1, F)
    v2 = quad_value(words, at.magic, 2, F)
    v3 = quad_value(words, at.magic, 3, F)
    if F.grouped:
        scale = scale_value(raw, row_scale, F)
        v0, v1, v2, v3 = v0 * scale, v1 * scale, v2 * scale, v3 * scale
        if F.asymmetric:
            v0, v1, v2, v3 = v0 + minimum, v1 + minimum, v2 + minimum, v3 + minimum
    return join4(v0, v1, v2, v3)
