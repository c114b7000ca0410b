"""Triton: decode R packets, sum them in fp32 in rank order, and encode the sum, in one launch and in registers.

What the owner of a token does between the two stages of an all-reduce. One program is one tile of one row, or of a few
rows, as in `encode.py`. That takes a value from the same place of all packets, so both layouts must send the same
features as outliers; where they do not, or rows do not divide, `encode_any.py` finds them one by one. A sum that
becomes codes of a trellis goes by way of memory.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a row.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.checks import check_requantize
from lowbit_kernels.decode_sum import launch_decode_sum
from lowbit_kernels.encode import encode
from lowbit_kernels.encode_any import launch_encode_any
from lowbit_kernels.group_scales import row_scale_bits
from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.pack import as_bits, as_float, bf16_bits
from lowbit_kernels.quads import sum_quads
from lowbit_kernels.rows import (
    DECODE_TILE,
    JUDGED_TILE,
    MAGIC,
    Source,
    Target,
    decodes_in_quads,
    encodes_in_units,
    format_of,
    rows_of_program,
    source_of,
    target_of,
    tiles_of,
)
from lowbit_kernels.sections import Row, end_of_row, sections_of
from lowbit_kernels.singles import first_outlier, sum_outliers
from lowbit_kernels.units import fill_gaps, largest_step, load_static, put_units, store_row_scale


def requantize(
    packets_RTB: Tensor | Sequence[Tensor],
    layout: PacketLayout,
    packet_TB: Tensor,
    gather_layout: PacketLayout,
    scale_RH: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum_RH: Tensor | None = None,
    *,
    gather_inverse_scale: Tensor | None = None,
    gather_body_index: Tensor | None = None,
    gather_outlier_index: Tensor | None = None,
    gather_minimum: Tensor | None = None,
) -> None:
    """See `reference.requantize`. Also ValueError for packet rows that are not aligned for their widest values.

    Fast where both layouts have no outliers, or are given the very same index tensors.
    """
    packets = check_requantize(
        packets_RTB, layout, packet_TB, gather_layout, scale_RH, body_index, outlier_index, minimum_RH,
        gather_inverse_scale, gather_body_index, gather_outlier_index, gather_minimum,
    )  # fmt: skip
    if gather_layout.has_trellis:
        sum_TH = torch.empty(packet_TB.shape[0], layout.features, device=packet_TB.device)
        launch_decode_sum(packets, layout, sum_TH, scale_RH, body_index, outlier_index, minimum_RH, add=False)
        encode(sum_TH, gather_layout, packet_TB, gather_inverse_scale, gather_body_index, gather_outlier_index)
        return
    in_place = (
        decodes_in_quads(layout)
        and encodes_in_units(gather_layout)
        and layout.outliers == gather_layout.outliers
        and _is_same(body_index, gather_body_index)
        and _is_same(outlier_index, gather_outlier_index)
    )
    tokens = packet_TB.shape[0]
    judged = gather_layout.row_scale_nbytes > 0
    tile = max(DECODE_TILE, gather_layout.group_size)
    if judged:
        tile = max(tile, min(triton.next_power_of_2(layout.body), JUDGED_TILE))
    tiles = tiles_of(layout.body, tile)
    rows = 1 if judged or not in_place else rows_of_program(tokens, tiles)
    source = source_of(packets, layout, scale_RH, minimum_RH, rows)
    target = target_of(packet_TB, gather_layout, gather_inverse_scale, gather_minimum, rows)
    if tokens == 0:
        return
    if not in_place:
        launch_encode_any(source, layout, outlier_index, target, gather_layout, gather_body_index, gather_outlier_index)
        return
    _requantize[(triton.cdiv(tokens, rows) * (1 if judged else tiles),)](
        source,
        layout.group_size,
        target,
        body_index,
        tokens,
        tiles,
        layout.body,
        layout.outliers,
        gather_layout.group_size,
        MAGIC,
        SOURCE=format_of(layout, packets),
        SOURCE_GROUP=layout.group_size,
        F=format_of(gather_layout, [packet_TB]),
        GROUP=gather_layout.group_size,
        RANKS=len(packets),
        ROWS=rows,
        TILE=tile,
        WHOLE=tiles == 1,
        num_warps=max(4, tile // 512),
        enable_fp_fusion=False,  # a product that overflows must not be rescued by the addition
    )


def _is_same(index: Tensor | None, other: Tensor | None) -> bool:
    """Whether two indices of equal length are one in memory: what they hold is not for the host to look at."""
    return index is other or (index is not None and other is not None and index.data_ptr() == other.data_ptr())


@triton.jit(do_not_specialize=["source_group_size", "tokens", "tiles", "body", "outliers", "group_size", "magic"])
def _requantize(
    source: Source,
    source_group_size: tl.tensor,
    target: Target,
    body_index: tl.tensor,
    tokens: tl.tensor,
    tiles: tl.tensor,
    body: tl.tensor,
    outliers: tl.tensor,
    group_size: tl.tensor,
    magic: tl.tensor,
    SOURCE: tl.constexpr,
    SOURCE_GROUP: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    source_at = sections_of(body, outliers, source_group_size, magic, SOURCE)
    at = sections_of(body, outliers, group_size, magic, F)
    program = tl.program_id(0)
    if F.scales == "e4m3":
        token = program.to(tl.int64)
        _requantize_judged(
            source, target, body_index, token, tiles, source_at, at, SOURCE, SOURCE_GROUP, F, GROUP, RANKS, TILE, WHOLE
        )
    else:
        token = (program // tiles).to(tl.int64) * ROWS
        start = program % tiles * TILE
        totals = sum_quads(source, token, tokens, start, source_at, SOURCE, SOURCE_GROUP, RANKS, ROWS, TILE // 4)
        inverse_scale, minimum = load_static(target, start, at, F, TILE)
        for i in tl.static_range(ROWS):
            end = end_of_row(at.body, token + i, tokens)
            row = target.packet + (token + i) * target.stride
            put_units(as_bits(totals[i]), row, start, end, inverse_scale, minimum, 1.0, at, F, GROUP)
            if start == 0:
                fill_gaps(row, token + i < tokens, at, F)
        if F.outliers:
            _put_outliers(source, target, body_index, token, tokens, start, source_at, at, RANKS, ROWS, TILE)


@triton.jit
def _requantize_judged(
    source: Source,
    target: Target,
    body_index: tl.tensor,
    token: tl.tensor,
    tiles: tl.tensor,
    source_at: Row,
    at: Row,
    SOURCE: tl.constexpr,
    SOURCE_GROUP: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    RANKS: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Encode one row with scales in e4m3: all of it is judged before any of it is encoded, see `encode.py`."""
    row = target.packet + token * target.stride
    fill_gaps(row, True, at, F)
    largest = tl.zeros((), tl.float32)
    if WHOLE:
        totals = sum_quads(source, token, token + 1, 0, source_at, SOURCE, SOURCE_GROUP, RANKS, 1, TILE // 4)
        inverse_scale, minimum = load_static(target, 0, at, F, TILE)
        raw = row_scale_bits(largest_step(as_bits(totals[0]), inverse_scale, 0, at, F, GROUP))
        put_units(as_bits(totals[0]), row, 0, at.body, inverse_scale, minimum, as_float(raw << 16), at, F, GROUP)
        if F.outliers:
            _put_outliers(source, target, body_index, token, token + 1, 0, source_at, at, RANKS, 1, TILE)
    else:
        for tile in range(tiles):
            start = tile * TILE
            totals = sum_quads(source, token, token + 1, start, source_at, SOURCE, SOURCE_GROUP, RANKS, 1, TILE // 4)
            inverse_scale, minimum = load_static(target, start, at, F, TILE)
            step = largest_step(as_bits(totals[0]), inverse_scale, start, at, F, GROUP)
            largest = tl.maximum(largest, step)
        raw = row_scale_bits(largest)
        for tile in range(tiles):
            start = tile * TILE
            totals = sum_quads(source, token, token + 1, start, source_at, SOURCE, SOURCE_GROUP, RANKS, 1, TILE // 4)
            inverse_scale, minimum = load_static(target, start, at, F, TILE)
            scale = as_float(raw << 16)
            put_units(as_bits(totals[0]), row, start, at.body, inverse_scale, minimum, scale, at, F, GROUP)
            if F.outliers:
                _put_outliers(source, target, body_index, token, token + 1, start, source_at, at, RANKS, 1, TILE)
    store_row_scale(row, raw, at)


@triton.jit
def _put_outliers(
    source: Source,
    target: Target,
    body_index: tl.tensor,
    token: tl.tensor,
    tokens: tl.tensor,
    start: tl.tensor,
    source_at: Row,
    at: Row,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Send the sums of the outliers between the features of a tile: lanes go by rows first, then by outliers."""
    PER_ROW: tl.constexpr = 128 // ROWS
    lane = tl.arange(0, 128)
    token_k = token + lane // PER_ROW
    section = (target.packet + token_k * target.stride + at.outliers_start).to(tl.pointer_type(tl.int16))
    last = first_outlier(body_index, start + TILE, at)
    for first in range(first_outlier(body_index, start, at), last, PER_ROW):
        k = first + lane % PER_ROW
        mask = (k < last) & (token_k < tokens)
        total = sum_outliers(source, token_k, k, mask, source_at, RANKS)
        tl.store(section + k, bf16_bits(as_bits(total)).to(tl.int16), mask=mask)
