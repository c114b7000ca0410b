"""Triton: decode a packet, add it to the residual stream, and normalise the stream, in one launch.

One program is one row. A row that fits one tile stays in registers between the sum of its squares and its norm; a
longer one is read twice. Additions and roots are rounded as IEEE says, so that a result depends on nothing but its row.

Legend: T tokens, H hidden features, K outliers, B bytes of a row.
"""

# Triton's tuples grow by addition: it knows no unpacking, and mypy no growth.
# mypy: allow-untyped-decorators, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.checks import check_decode_add_norm
from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.rows import (
    MAGIC,
    Rows,
    Source,
    decodes_in_quads,
    format_of,
    rows_as_bits,
    source_of,
    tiles_of,
)
from lowbit_kernels.sections import sections_of
from lowbit_kernels.stream import (
    Stream,
    decode_tile,
    features_of_tile,
    inverse_root,
    join,
    join_outliers,
    join_tile,
    load_outliers,
    load_stream,
    normalise_outliers,
    normalise_tile,
    store_norm,
)

#: Values of a tile: 4 for each thread. A program takes so many tiles of its row into its registers.
TILE, SMALL_TILE = 2048, 512
MOST_TILES = 8
#: Up to so many rows there is one for each multiprocessor at most.
FEW_TOKENS = 128
OUTLIER_TILE = 256


def decode_add_norm(
    packet_TB: Tensor,
    layout: PacketLayout,
    residual_TH: Tensor,
    normed_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum: Tensor | None = None,
    bias_H: Tensor | None = None,
) -> None:
    """See `reference.decode_add_norm`. Also ValueError for packet rows that are not aligned for their widest values."""
    check_decode_add_norm(
        packet_TB, layout, residual_TH, normed_TH, weight_H, scale, body_index, outlier_index, minimum, bias_H
    )
    scale_RH = None if scale is None else scale.unsqueeze(0)
    minimum_RH = None if minimum is None else minimum.unsqueeze(0)
    source = source_of([packet_TB], layout, scale_RH, minimum_RH, rows=1)
    tokens = residual_TH.shape[0]
    if tokens == 0:
        return
    tile = TILE if layout.body > 4 * SMALL_TILE else SMALL_TILE
    tiles = tiles_of(layout.body, tile)
    in_quads = decodes_in_quads(layout)
    _decode_add_norm[(tokens,)](
        source,
        body_index,
        outlier_index,
        rows_as_bits(residual_TH, rows=1),
        rows_as_bits(normed_TH, rows=1),
        weight_H,
        bias_H,
        eps,
        tiles,
        layout.body,
        layout.outliers,
        layout.group_size,
        MAGIC,
        F=format_of(layout, [packet_TB]),
        GROUP=layout.group_size if in_quads else 0,
        IN_QUADS=in_quads,
        IS_BF16=normed_TH.dtype == torch.bfloat16,
        TILE=tile,
        TILES=tiles if tiles <= MOST_TILES else 0,
        EARLY=tokens <= FEW_TOKENS,
        OUTLIERS=OUTLIER_TILE,
        num_warps=tile // 128,
        # two programs on a multiprocessor are worth the few values that spill where features are scattered
        maxnreg=64 if layout.outliers and tokens > FEW_TOKENS else None,
        enable_fp_fusion=False,  # the residual stream is to be the reference's, bit for bit
    )


_NOT_SPECIALIZED = ("body_index", "outlier_index", "eps", "tiles", "body", "outliers", "group_size", "magic")


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _decode_add_norm(
    source: Source,
    body_index: tl.tensor,
    outlier_index: tl.tensor,
    residual: Rows,
    normed: Rows,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    eps: tl.tensor,
    tiles: tl.tensor,
    body: tl.tensor,
    outliers: tl.tensor,
    group_size: tl.tensor,
    magic: tl.tensor,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    IN_QUADS: tl.constexpr,
    IS_BF16: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    EARLY: tl.constexpr,
    OUTLIERS: tl.constexpr,
) -> None:
    """TILES: of a row that stays in registers, else 0.

    EARLY: load all that a row needs before any of it is used: one wait for memory instead of several, at the price of
    registers. Without, other rows on the same multiprocessor fill the waits.
    """
    at = sections_of(body, outliers, group_size, magic, F)
    token = tl.program_id(0).to(tl.int64)
    stream = Stream(
        residual.data + token * residual.stride,
        normed.data + token * normed.stride,
        weight_ptr,
        bias_ptr,
        body_index,
        outlier_index,
    )
    squares = tl.zeros((), tl.float32)
    if F.outliers:
        # one step does for almost all sets of outliers, so it stands by itself; loops below are for the rest
        k = tl.arange(0, OUTLIERS)
        value_k, feature_k, old_k = load_outliers(stream, source, token, k, at)
        weight_k = tl.load(weight_ptr + feature_k, mask=k < at.outliers)
    parts = ()
    for tile in tl.static_range(TILES):
        feature, mask = features_of_tile(stream, tile * TILE, at, F, TILE)
        old = feature
        weight = feature
        if EARLY:
            old = load_stream(stream, feature, mask)
            weight = tl.load(weight_ptr + feature, mask=mask)
        parts = parts + ((feature, mask, old, weight),)
    joined = ()
    sum_of_tiles = 0.0
    for tile in tl.static_range(TILES):
        feature, mask, old, weight = parts[tile]
        value = decode_tile(source, token, tile * TILE, at, F, GROUP, IN_QUADS, TILE)
        if not EARLY:
            old = load_stream(stream, feature, mask)
        x = join(stream, value, old, feature, mask)
        joined = joined + (x,)
        sum_of_tiles = sum_of_tiles + x * x
    if TILES > 0:
        squares += tl.sum(tl.reshape(sum_of_tiles, (TILE,)), axis=0)
    else:
        for number in range(tiles):
            squares += join_tile(stream, source, token, number * TILE, at, F, GROUP, IN_QUADS, TILE)
    if F.outliers:
        joined_k = join(stream, value_k, old_k, feature_k, k < at.outliers)
        squares += tl.sum(joined_k * joined_k, axis=0)
        for first in range(OUTLIERS, at.outliers, OUTLIERS):
            squares += join_outliers(stream, source, token, first, at, OUTLIERS)
    inverse = inverse_root(squares, at, eps)
    for tile in tl.static_range(TILES):
        feature, mask, old, weight = parts[tile]
        if not EARLY:
            weight = tl.load(weight_ptr + feature, mask=mask)
        store_norm(stream, joined[tile] * inverse * weight, feature, mask, IS_BF16)
    if TILES == 0:
        tl.debug_barrier()  # a thread reads what another one may have written
        for number in range(tiles):
            normalise_tile(stream, inverse, number * TILE, at, F, IS_BF16, TILE)
    if F.outliers:
        store_norm(stream, joined_k * inverse * weight_k, feature_k, k < at.outliers, IS_BF16)
        if at.outliers > OUTLIERS:
            tl.debug_barrier()
            for first in range(OUTLIERS, at.outliers, OUTLIERS):
                normalise_outliers(stream, inverse, first, at, IS_BF16, OUTLIERS)
