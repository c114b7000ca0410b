"""Triton: encode rows that do not divide into whole units or groups, from values or from the sum of packets.

The general way beside the fast ones of `encode.py` and `requantize.py`: any sizes, any two sets of outliers. With
groups one program takes a row, in two passes: it writes the scales of all groups, then reads them as a decoder would
and encodes with them.

Legend: T tokens, K outliers, R ranks. S tells of what is fetched, F of what it is encoded in.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.fetch import Fetch, Fetched, fetch_features, fetch_values
from lowbit_kernels.group_scales import (
    encoded_scale,
    group_key,
    is_lost,
    load_minimum,
    load_row_scale,
    load_scale,
    low_key,
    row_scale_bits,
    scale_value,
    store_minimum,
    store_scale,
    wanted_step,
)
from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.pack import (
    ROUNDED_ZERO,
    as_float,
    bf16_bits,
    is_finite,
    level_code,
    one_nan,
    rounded_code,
    small_float_code,
)
from lowbit_kernels.rows import Rows, Source, Target, format_of, tiles_of
from lowbit_kernels.sections import Row, sections_of
from lowbit_kernels.units import fill_gaps, store_row_scale

TILE = 1024


def launch_encode_any(
    x: Rows | Source,
    layout: PacketLayout | None,
    source_outlier_index: Tensor | None,
    target: Target,
    target_layout: PacketLayout,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
) -> None:
    """Encode rows of values, or the sum of packets of `layout`, whose outliers these are. All was checked."""
    if isinstance(x, Source):
        assert layout is not None
        fetched = Fetched(len(x.packets), format_of(layout, x.packets), False)
        sizes = layout.body, layout.outliers, layout.group_size
    else:
        fetched = Fetched(0, None, x.data.itemsize == 2)
        sizes = 0, 0, 0
    tokens, tiles = target.packet.shape[0], tiles_of(target_layout.body, TILE)
    size = target_layout.group_size
    _encode_any[(tokens if size else tokens * tiles,)](
        x,
        source_outlier_index,
        *sizes,
        target,
        body_index,
        outlier_index,
        tiles,
        target_layout.body,
        target_layout.outliers,
        size,
        S=fetched,
        F=format_of(target_layout, [target.packet]),
        PART=min(triton.next_power_of_2(max(size, 1)), TILE),
        TILE=TILE,
        num_warps=4,
        enable_fp_fusion=False,
    )


_SIZES = ("source_body", "source_outliers", "source_group_size", "tiles", "body", "outliers", "group_size")


@triton.jit(do_not_specialize=_SIZES)
def _encode_any(
    x: Rows | Source,
    source_outlier_index: tl.tensor,
    source_body: tl.tensor,
    source_outliers: tl.tensor,
    source_group_size: tl.tensor,
    target: Target,
    body_index: tl.tensor,
    outlier_index: tl.tensor,
    tiles: tl.tensor,
    body: tl.tensor,
    outliers: tl.tensor,
    group_size: tl.tensor,
    S: tl.constexpr,
    F: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    at = sections_of(body, outliers, group_size, 0, F)
    source_at = at
    if S.ranks > 0:
        PACKETS: tl.constexpr = S.packets
        source_at = sections_of(source_body, source_outliers, source_group_size, 0, PACKETS)
    fetch = Fetch(x, source_outlier_index, source_at, body_index, target.inverse_scale)
    program = tl.program_id(0)
    if F.grouped:
        token = program.to(tl.int64)
        row = target.packet + token * target.stride
        row_scale = 0.0
        if F.scales == "e4m3":
            largest = tl.zeros((), tl.float32)
            for first in range(0, at.groups, TILE // PART):
                largest = tl.maximum(largest, _largest_step(fetch, token, first, at, S, F, PART, TILE))
            raw_row_scale = row_scale_bits(largest)
            store_row_scale(row, raw_row_scale, at)
            row_scale = as_float(raw_row_scale << 16)
        for first in range(0, at.groups, TILE // PART):
            _put_scales(fetch, token, row, first, row_scale, at, S, F, PART, TILE)
        tl.debug_barrier()  # the scales that threads wrote are read by others
        for start in range(0, at.body, TILE):
            _put_tile(fetch, token, row, start, target.minimum, at, S, F, TILE)
    else:
        token = (program // tiles).to(tl.int64)
        row = target.packet + token * target.stride
        _put_tile(fetch, token, row, program % tiles * TILE, target.minimum, at, S, F, TILE)
    if F.grouped or program % tiles == 0:
        fill_gaps(row, True, at, F)
        if F.outliers:
            section = (row + at.outliers_start).to(tl.pointer_type(tl.int16))
            for first_k in range(0, at.outliers, TILE):
                k = first_k + tl.arange(0, TILE)
                feature = tl.load(outlier_index + k, mask=k < at.outliers, other=0).to(tl.int32)
                sent = bf16_bits(fetch_features(fetch, token, feature, k < at.outliers, S))
                tl.store(section + k, sent.to(tl.int16), mask=k < at.outliers)


@triton.jit
def _judged(
    fetch: Fetch,
    token: tl.tensor,
    first: tl.tensor,
    at: Row,
    S: tl.constexpr,
    F: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The largest keys and low keys of groups `first` to `first + TILE / PART - 1`, read `PART` values at a time."""
    group = first + tl.arange(0, TILE // PART)[:, None]
    key = tl.zeros((TILE // PART,), tl.uint32)
    low = tl.zeros((TILE // PART,), tl.uint32)
    for begin in range(0, at.group_size, PART):
        place = begin + tl.arange(0, PART)[None, :]
        value = group * at.group_size + place
        mask = (place < at.group_size) & (value < at.body)
        keys = group_key(fetch_values(fetch, token, value, mask, S, F), F)
        key = tl.maximum(key, tl.max(tl.where(mask, keys, 0), axis=1))
        low = tl.maximum(low, tl.max(tl.where(mask, low_key(keys), 0), axis=1))
    return key, low


@triton.jit
def _largest_step(
    fetch: Fetch,
    token: tl.tensor,
    first: tl.tensor,
    at: Row,
    S: tl.constexpr,
    F: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """The largest wanted step of the finite ones of these groups; groups behind the last one want none."""
    key, low = _judged(fetch, token, first, at, S, F, PART, TILE)
    return tl.max(tl.where(is_lost(key, low, F), 0.0, tl.abs(wanted_step(key, low, F))), axis=0)


@triton.jit
def _put_scales(
    fetch: Fetch,
    token: tl.tensor,
    row: tl.tensor,
    first: tl.tensor,
    row_scale: tl.tensor,
    at: Row,
    S: tl.constexpr,
    F: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Write the scales and minimums of these groups."""
    key, low = _judged(fetch, token, first, at, S, F, PART, TILE)
    group = first + tl.arange(0, TILE // PART)
    store_scale(row, group, encoded_scale(key, low, row_scale, F), group < at.groups, at, F)
    if F.asymmetric:
        store_minimum(row, group, low, is_lost(key, low, F), group < at.groups, at)


@triton.jit
def _put_tile(
    fetch: Fetch,
    token: tl.tensor,
    row: tl.tensor,
    start: tl.tensor,
    minimum: tl.tensor,
    at: Row,
    S: tl.constexpr,
    F: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Encode values `start` to `start + TILE - 1` of the body; `start` is a multiple of 8, so of whole bytes."""
    value = start + tl.arange(0, TILE)
    mask = value < at.body
    bits = fetch_values(fetch, token, value, mask, S, F)
    if F.bits == 32:
        tl.store(row.to(tl.pointer_type(tl.int32)) + value, one_nan(as_float(bits)), mask=mask)
    elif F.bits == 16:
        tl.store(row.to(tl.pointer_type(tl.int16)) + value, bf16_bits(bits).to(tl.int16), mask=mask)
    else:
        y = as_float(bits)
        if F.grouped:
            row_scale = 0.0
            if F.scales == "e4m3":
                row_scale = load_row_scale(row, True, at)
            group = value // at.group_size
            scale = scale_value(load_scale(row, group, mask, at, F), row_scale, F)
            if F.asymmetric:
                y = y - load_minimum(row, group, mask, at)
            code = tl.where(scale == scale, _code_of(y * tl.div_rn(1.0, scale), F), 0)
        else:
            finite = is_finite(y)
            if F.asymmetric:
                y = y - tl.load(minimum + value, mask=mask, other=0.0)
            code = _code_of(y * tl.load(fetch.inverse_scale + value, mask=mask, other=1.0), F)
            code = tl.where(finite, code, F.lost)
        store_planes(row, start, tl.where(mask, code, 0), at, F)


@triton.jit
def _code_of(product: tl.tensor, F: tl.constexpr) -> tl.tensor:
    """Codes (int32) of scaled values; integers in two's complement, wider than they are sent."""
    if F.is_int:
        code = rounded_code(product, F.lowest, F.highest, 0) - ROUNDED_ZERO
    elif F.has_levels:
        code = level_code(product, F)
    else:
        code = small_float_code(product, F.values == "e4m3")
    return code


@triton.jit
def store_planes(row: tl.tensor, start: tl.tensor, code: tl.tensor, at: Row, F: tl.constexpr) -> None:
    """Write the codes (int32, wider than they are sent) of a tile, 0 behind the body, into the planes of a row."""
    FIRST: tl.constexpr = 8 if F.bits == 8 else 4 if F.bits >= 4 else 2
    _store_bytes(row, start, code, at, 0, FIRST)
    if F.planes > 1:
        _store_bytes(row + at.second_plane, start, code, at, FIRST, 2 if F.bits > 5 else 1)
    if F.planes > 2:
        _store_bytes(row + at.third_plane, start, code, at, 6, 1)


@triton.jit
def _store_bytes(
    plane: tl.tensor, start: tl.tensor, code: tl.tensor, at: Row, SHIFT: tl.constexpr, WIDTH: tl.constexpr
) -> None:
    """Write bits `SHIFT` to `SHIFT + WIDTH - 1` of each code of a tile into a plane, up to the byte of the last one."""
    IN_BYTE: tl.constexpr = 8 // WIDTH
    BYTES: tl.constexpr = code.shape[0] // IN_BYTE
    part = (code >> SHIFT) & (2**WIDTH - 1)
    place = tl.arange(0, code.shape[0]) % IN_BYTE * WIDTH
    content = tl.sum(tl.reshape(part << place, (BYTES, IN_BYTE)), axis=1)
    byte = start // IN_BYTE + tl.arange(0, BYTES)
    tl.store(plane + byte, content.to(tl.uint8), mask=byte < (at.body * WIDTH + 7) // 8)
