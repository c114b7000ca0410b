"""Triton: encode, in one launch. One program is one tile of one row, or of a few rows where there are many.

With outliers a tile is one of body values, gathered from the features that `body_index` names; it also sends the
outliers that lie between its features. Where group scales travel in e4m3 a program judges the whole row first, for its
row scale. Rows that do not divide into whole units go through `encode_any.py`. Codes of a trellis come from
`trellis.py`, in two more launches.

Legend: T tokens, H hidden features, K outliers, B bytes of a row.
"""

# Triton's tuples grow by addition: it knows no unpacking, and mypy no growth.
# mypy: allow-untyped-decorators, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005
from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.checks import check_encode
from lowbit_kernels.encode_any import launch_encode_any
from lowbit_kernels.group_scales import row_scale_bits
from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.pack import as_float, bf16_bits, load_bits
from lowbit_kernels.rows import (
    ENCODE_TILE,
    JUDGED_TILE,
    MAGIC,
    Rows,
    Target,
    encodes_in_units,
    format_of,
    rows_as_bits,
    rows_of_program,
    target_of,
    tiles_of,
)
from lowbit_kernels.sections import Row, end_of_row, sections_of
from lowbit_kernels.singles import first_outlier
from lowbit_kernels.trellis import put_trellis_codes
from lowbit_kernels.units import fill_gaps, largest_step, load_static, put_units, store_row_scale


def encode(
    x_TH: Tensor,
    layout: PacketLayout,
    packet_TB: Tensor,
    inverse_scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum: Tensor | None = None,
) -> None:
    """See `reference.encode`. Also ValueError for packet rows that are not aligned for their widest values."""
    check_encode(x_TH, layout, packet_TB, inverse_scale, body_index, outlier_index, minimum)
    if layout.has_trellis:
        levels = replace(layout, values="lm")  # all but the codes is the same
        encode(x_TH, levels, packet_TB, inverse_scale, body_index, outlier_index)
        put_trellis_codes(x_TH, layout, packet_TB, inverse_scale, body_index)
        return
    tokens = x_TH.shape[0]
    is_bf16 = x_TH.dtype == torch.bfloat16
    in_units = encodes_in_units(layout)
    judged = layout.row_scale_nbytes > 0
    # fp32 values are 4 to a 16-byte load, bf16 ones 8
    tile = max(ENCODE_TILE if is_bf16 else ENCODE_TILE // 2, layout.group_size)
    if judged:
        tile = max(tile, min(triton.next_power_of_2(layout.body), JUDGED_TILE))
    tiles = tiles_of(layout.body, tile)
    rows = 1 if judged or not in_units else rows_of_program(tokens, tiles)
    target = target_of(packet_TB, layout, inverse_scale, minimum, rows)
    if tokens == 0:
        return
    x = rows_as_bits(x_TH, rows)
    if not in_units:
        launch_encode_any(x, None, None, target, layout, body_index, outlier_index)
        return
    _encode[(triton.cdiv(tokens, rows) * (1 if judged else tiles),)](
        x,
        target,
        body_index,
        outlier_index,
        tokens,
        tiles,
        layout.body,
        layout.outliers,
        layout.group_size,
        MAGIC,
        F=format_of(layout, [packet_TB]),
        GROUP=layout.group_size,
        IS_BF16=is_bf16,
        ROWS=rows,
        TILE=tile,
        WHOLE=tiles == 1,
        num_warps=max(4, tile // 512),
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=["tokens", "tiles", "body", "outliers", "group_size", "magic"])
def _encode(
    x: Rows,
    target: Target,
    body_index: tl.tensor,
    outlier_index: tl.tensor,
    tokens: tl.tensor,
    tiles: tl.tensor,
    body: tl.tensor,
    outliers: tl.tensor,
    group_size: tl.tensor,
    magic: tl.tensor,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    IS_BF16: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    at = sections_of(body, outliers, group_size, magic, F)
    program = tl.program_id(0)
    if F.scales == "e4m3":
        _encode_judged(
            x, target, body_index, outlier_index, program.to(tl.int64), tiles, at, F, GROUP, IS_BF16, TILE, WHOLE
        )
    else:
        token = (program // tiles).to(tl.int64) * ROWS
        start = program % tiles * TILE
        feature = _features(start, body_index, at, F, TILE)
        loaded = ()
        for i in tl.static_range(ROWS):
            end = end_of_row(at.body, token + i, tokens)
            loaded = loaded + (_load_tile(x, token + i, feature, start, end, F, IS_BF16),)
        inverse_scale, minimum = load_static(target, start, at, F, TILE)
        for i in tl.static_range(ROWS):
            end = end_of_row(at.body, token + i, tokens)
            row = target.packet + (token + i) * target.stride
            put_units(loaded[i], row, start, end, inverse_scale, minimum, 1.0, at, F, GROUP)
            if start == 0:
                fill_gaps(row, token + i < tokens, at, F)
        if F.outliers:
            _put_outliers(x, target, body_index, outlier_index, token, tokens, start, at, IS_BF16, ROWS, TILE)


@triton.jit
def _encode_judged(
    x: Rows,
    target: Target,
    body_index: tl.tensor,
    outlier_index: tl.tensor,
    token: tl.tensor,
    tiles: tl.tensor,
    at: Row,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    IS_BF16: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Encode one row with scales in e4m3: all of it is judged before any of it is encoded.

    WHOLE: one tile holds it, and stays in registers meanwhile.
    """
    row = target.packet + token * target.stride
    fill_gaps(row, True, at, F)
    if WHOLE:
        feature = _features(0, body_index, at, F, TILE)
        bits = _load_tile(x, token, feature, 0, at.body, F, IS_BF16)
        inverse_scale, minimum = load_static(target, 0, at, F, TILE)
        raw = row_scale_bits(largest_step(bits, inverse_scale, 0, at, F, GROUP))
        put_units(bits, row, 0, at.body, inverse_scale, minimum, as_float(raw << 16), at, F, GROUP)
        store_row_scale(row, raw, at)
        if F.outliers:
            _put_outliers(x, target, body_index, outlier_index, token, token + 1, 0, at, IS_BF16, 1, TILE)
    else:
        largest = tl.zeros((), tl.float32)
        for tile in range(tiles):
            feature = _features(tile * TILE, body_index, at, F, TILE)
            bits = _load_tile(x, token, feature, tile * TILE, at.body, F, IS_BF16)
            inverse_scale, minimum = load_static(target, tile * TILE, at, F, TILE)
            largest = tl.maximum(largest, largest_step(bits, inverse_scale, tile * TILE, at, F, GROUP))
        raw = row_scale_bits(largest)
        store_row_scale(row, raw, at)
        for tile in range(tiles):
            feature = _features(tile * TILE, body_index, at, F, TILE)
            bits = _load_tile(x, token, feature, tile * TILE, at.body, F, IS_BF16)
            inverse_scale, minimum = load_static(target, tile * TILE, at, F, TILE)
            put_units(bits, row, tile * TILE, at.body, inverse_scale, minimum, as_float(raw << 16), at, F, GROUP)
            if F.outliers:
                _put_outliers(x, target, body_index, outlier_index, token, token + 1, tile * TILE, at, IS_BF16, 1, TILE)


@triton.jit
def _features(start: tl.tensor, body_index: tl.tensor, at: Row, F: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """Features (int32) of values `start` to `start + TILE - 1` of the body."""
    feature = start + tl.arange(0, TILE)
    if F.outliers:
        feature = tl.load(body_index + feature, mask=feature // F.unit < at.body // F.unit, other=0).to(tl.int32)
    return feature


@triton.jit
def _load_tile(
    x: Rows,
    token: tl.tensor,
    feature: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    F: tl.constexpr,
    IS_BF16: tl.constexpr,
) -> tl.tensor:
    """fp32 bits of the `_features` of a row; anything for values from `end` on."""
    value = start + tl.arange(0, feature.shape[0])
    return load_bits(x.data + token * x.stride + feature, value // F.unit < end // F.unit, IS_BF16)


@triton.jit
def _put_outliers(
    x: Rows,
    target: Target,
    body_index: tl.tensor,
    outlier_index: tl.tensor,
    token: tl.tensor,
    tokens: tl.tensor,
    start: tl.tensor,
    at: Row,
    IS_BF16: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Send the outliers between the features of a tile: lanes go by rows first, then by outliers, which are few."""
    PER_ROW: tl.constexpr = 128 // ROWS
    lane = tl.arange(0, 128)
    token_k = token + lane // PER_ROW
    section = (target.packet + token_k * target.stride + at.outliers_start).to(tl.pointer_type(tl.int16))
    last = first_outlier(body_index, start + TILE, at)
    for first in range(first_outlier(body_index, start, at), last, PER_ROW):
        k = first + lane % PER_ROW
        mask = (k < last) & (token_k < tokens)
        feature = tl.load(outlier_index + k, mask=mask, other=0)
        bits = load_bits(x.data + token_k * x.stride + feature, mask, IS_BF16)
        tl.store(section + k, bf16_bits(bits).to(tl.int16), mask=mask)
