"""Triton: decode R packets and sum them in fp32 in rank order, in one launch, into a buffer or onto what it holds.

One program is one tile of one row, or of a few rows where there are many. With outliers a tile is one of body values,
whose features are read from `body_index`; it adds the outliers that lie between its features, so that whole cache
lines are written at about the same time. Packets may lie anywhere: their addresses are arguments of the launch, which
a CUDA graph keeps.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a row.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.checks import check_decode_sum
from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.pack import as_float, one_nan
from lowbit_kernels.quads import sum_quads
from lowbit_kernels.rows import (
    DECODE_TILE,
    MAGIC,
    Rows,
    Source,
    decodes_in_quads,
    format_of,
    rows_as_bits,
    rows_of_program,
    source_of,
    tiles_of,
)
from lowbit_kernels.sections import end_of_row, sections_of
from lowbit_kernels.singles import first_outlier, sum_outliers, sum_values


def decode_sum(
    packets_RTB: Tensor | Sequence[Tensor],
    layout: PacketLayout,
    out_TH: Tensor,
    scale_RH: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum_RH: Tensor | None = None,
) -> None:
    """See `reference.decode_sum`. Also ValueError for packet rows that are not aligned for their widest values."""
    packets = check_decode_sum(packets_RTB, layout, out_TH, scale_RH, body_index, outlier_index, minimum_RH)
    launch_decode_sum(packets, layout, out_TH, scale_RH, body_index, outlier_index, minimum_RH, add=False)


def launch_decode_sum(
    packets: Sequence[Tensor],
    layout: PacketLayout,
    out_TH: Tensor,
    scale_RH: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
    minimum_RH: Tensor | None,
    add: bool,
) -> None:
    """Sum the packets into `out_TH`, or add their sum to it. The arguments have been checked."""
    tokens = out_TH.shape[0]
    tiles = tiles_of(layout.body, DECODE_TILE)
    rows = rows_of_program(tokens, tiles)
    source = source_of(packets, layout, scale_RH, minimum_RH, rows)
    if tokens == 0:
        return
    in_quads = decodes_in_quads(layout)
    _decode_sum[(triton.cdiv(tokens, rows) * tiles,)](
        source,
        body_index,
        outlier_index,
        rows_as_bits(out_TH, rows),
        tokens,
        tiles,
        layout.body,
        layout.outliers,
        layout.group_size,
        MAGIC,
        F=format_of(layout, packets),
        GROUP=layout.group_size if in_quads else 0,
        IN_QUADS=in_quads,
        ADD=add,
        RANKS=len(packets),
        ROWS=rows,
        TILE=DECODE_TILE,
        num_warps=DECODE_TILE // 128,
        enable_fp_fusion=False,  # a product that overflows must not be rescued by the addition
    )


@triton.jit(
    do_not_specialize=["body_index", "outlier_index", "tokens", "tiles", "body", "outliers", "group_size", "magic"]
)
def _decode_sum(
    source: Source,
    body_index: tl.tensor,
    outlier_index: tl.tensor,
    out: Rows,
    tokens: tl.tensor,
    tiles: tl.tensor,
    body: tl.tensor,
    outliers: tl.tensor,
    group_size: tl.tensor,
    magic: tl.tensor,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    IN_QUADS: tl.constexpr,
    ADD: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    LANES: tl.constexpr = TILE // 4
    at = sections_of(body, outliers, group_size, magic, F)
    program = tl.program_id(0)
    token = (program // tiles).to(tl.int64) * ROWS
    start = program % tiles * TILE
    value = start + tl.arange(0, TILE)
    if F.outliers:
        # One row of two dimensions: what is stored value by value lies otherwise in the threads than what is loaded in
        # vectors, and were the shapes the same, Triton would load features as it loads vectors, and move addresses.
        value = value[None, :]
        feature = tl.load(body_index + value, mask=value < at.body, other=0).to(tl.int32)
    else:
        feature = value
    if IN_QUADS:
        totals = sum_quads(source, token, tokens, start, at, F, GROUP, RANKS, ROWS, LANES)
        for i in tl.static_range(ROWS):
            total = tl.reshape(totals[i], value.shape)
            end = end_of_row(at.body, token + i, tokens)
            mask = value < end if F.outliers else value // F.unit < end // F.unit
            _put(total, out.data + (token + i) * out.stride + feature, mask, ADD)
    else:
        for i in tl.static_range(ROWS):
            mask = value < end_of_row(at.body, token + i, tokens)
            total = sum_values(source, tl.minimum(token + i, tokens - 1), value, mask, at, F, RANKS)
            _put(total, out.data + (token + i) * out.stride + feature, mask, ADD)
    if F.outliers:
        # lanes go by rows first, then by outliers: there are few of these between the features of a tile
        PER_ROW: tl.constexpr = LANES // ROWS
        lane = tl.arange(0, LANES)
        token_k = token + lane // PER_ROW
        last = first_outlier(body_index, start + TILE, at)
        for first in range(first_outlier(body_index, start, at), last, PER_ROW):
            k = first + lane % PER_ROW
            mask_k = (k < last) & (token_k < tokens)
            total_k = sum_outliers(source, token_k, k, mask_k, at, RANKS)
            feature_k = tl.load(outlier_index + k, mask=mask_k, other=0)
            _put(total_k, out.data + token_k * out.stride + feature_k, mask_k, ADD)


@triton.jit
def _put(total: tl.tensor, pointer: tl.tensor, mask: tl.tensor, ADD: tl.constexpr) -> None:
    if ADD:
        total = as_float(tl.load(pointer, mask=mask, other=0)) + total
    tl.store(pointer, one_nan(total), mask=mask)
