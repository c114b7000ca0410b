"""The steps of an all-reduce between GPUs that can address each other: what runs on the host.

`push_partials`, `push_sums` and `take_sums`, one launch each, in this order on one stream, by all ranks for the same
message. `symmetric_kernels.py` has the kernels; together they give the bits of `encode`, `requantize` and `decode`.
Importing it imports Triton.

Legend: T tokens, H hidden features, R ranks, D body features, B bytes of a packet row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lowbit_kernels.fetch import Fetched
from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.rows import (
    DECODE_TILE,
    ENCODE_TILE,
    JUDGED_TILE,
    MAGIC,
    decodes_in_quads,
    encodes_in_units,
    format_of,
    rows_as_bits,
    tiles_of,
)
from lowbit_kernels.symmetric_endpoint import Endpoint, row_stride
from lowbit_kernels.symmetric_kernels import _push_partials, _push_sums, _take_sums

ANY_TILE = 1024


@dataclass(frozen=True)
class Stage:
    """The format of one stage, with the static tensors of all its senders.

    scale_RD, minimum_RD: fp32, a row for each rank (reduce stage), or one row (gather stage, whose values all owners
    encode alike); None where the layout has no use for them. inverse_RD: 1 / scale_RD.
    """

    layout: PacketLayout
    scale_RD: Tensor | None
    inverse_RD: Tensor | None
    minimum_RD: Tensor | None
    body_index: Tensor | None
    outlier_index: Tensor | None


def stage_of(
    layout: PacketLayout,
    scale_RD: Tensor | None,
    minimum_RD: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
) -> Stage:
    """A stage of these static tensors; the indices are left out where `layout` sets no outliers apart.

    Of a layout without a trellis, whose codes no kernel here finds.
    """
    assert not layout.has_trellis, layout
    assert (scale_RD is not None) == layout.needs_static, layout
    assert (minimum_RD is not None) == layout.needs_minimum, layout
    inverse_RD = None if scale_RD is None else 1.0 / scale_RD
    index = (body_index, outlier_index) if layout.outliers else (None, None)
    return Stage(layout, scale_RD, inverse_RD, minimum_RD, *index)


def push_partials(endpoint: Endpoint, x_TH: Tensor, stage: Stage) -> None:
    """Stage 1: this rank's partials (fp32 or bf16 `[T, H]`) to the owners of their tokens, as `reference.encode`."""
    layout, tokens = stage.layout, x_TH.shape[0]
    _check_values("x_TH", x_TH, layout, (torch.float32, torch.bfloat16), endpoint)
    endpoint.check(tokens, layout)
    if tokens == 0:
        return
    is_bf16 = x_TH.dtype == torch.bfloat16
    cut = _cut(layout, encodes_in_units(layout), ENCODE_TILE if is_bf16 else ENCODE_TILE // 2)
    _push_partials[(_programs(endpoint, tokens, cut.parts),)](
        endpoint.link(0),
        rows_as_bits(x_TH, rows=1),
        row_stride(layout.row_nbytes),
        _row(stage.inverse_RD, endpoint.rank),
        _row(stage.minimum_RD, endpoint.rank),
        stage.body_index,
        stage.outlier_index,
        tokens,
        cut.parts,
        cut.tiles,
        layout.body,
        layout.outliers,
        layout.group_size,
        MAGIC,
        FETCHED=Fetched(0, None, is_bf16),
        F=format_of(layout, [_region(endpoint, 0, layout)]),
        GROUP=layout.group_size,
        IS_BF16=is_bf16,
        TILE=cut.tile,
        PART=cut.part,
        WHOLE=cut.tiles == 1,
        ANY=cut.any_layout,
        HARDWARE=endpoint.on_gpu,
        num_warps=cut.warps,
        enable_fp_fusion=False,
    )


def push_sums(endpoint: Endpoint, tokens: int, stage: Stage, gather: Stage) -> None:
    """Stage 2: the sums of the tokens this rank owns to all ranks, as `reference.requantize`."""
    layout, gather_layout = stage.layout, gather.layout
    endpoint.check(tokens, gather_layout)
    if tokens == 0:
        return
    in_place = (
        decodes_in_quads(layout)
        and encodes_in_units(gather_layout)
        and layout.outliers == gather_layout.outliers
        and stage.body_index is gather.body_index
        and stage.outlier_index is gather.outlier_index
    )
    cut = _cut(gather_layout, in_place, DECODE_TILE)
    source_format = format_of(layout, [_region(endpoint, 0, layout)])
    most = triton.cdiv(tokens, endpoint.ranks)
    _push_sums[(_programs(endpoint, most, cut.parts),)](
        endpoint.link(0),
        row_stride(layout.row_nbytes),
        stage.scale_RD,
        0 if stage.scale_RD is None else stage.scale_RD.stride(0),
        stage.minimum_RD,
        0 if stage.minimum_RD is None else stage.minimum_RD.stride(0),
        stage.outlier_index,
        layout.body,
        layout.outliers,
        layout.group_size,
        row_stride(gather_layout.row_nbytes),
        _row(gather.inverse_RD, 0),
        _row(gather.minimum_RD, 0),
        gather.body_index,
        gather.outlier_index,
        tokens,
        cut.parts,
        cut.tiles,
        gather_layout.body,
        gather_layout.outliers,
        gather_layout.group_size,
        MAGIC,
        FETCHED=Fetched(endpoint.ranks, source_format, False),
        SOURCE=source_format,
        SOURCE_GROUP=layout.group_size,
        F=format_of(gather_layout, [_region(endpoint, 1, gather_layout)]),
        GROUP=gather_layout.group_size,
        RANKS=endpoint.ranks,
        TILE=cut.tile,
        PART=cut.part,
        WHOLE=cut.tiles == 1,
        ANY=cut.any_layout,
        HARDWARE=endpoint.on_gpu,
        num_warps=cut.warps,
        enable_fp_fusion=False,  # a product that overflows must not be rescued by the addition
    )


def take_sums(endpoint: Endpoint, gather: Stage, out_TH: Tensor, add: bool = False) -> None:
    """Stage 3: the sums of all tokens into `out_TH` (fp32 `[T, H]`), as `reference.decode`; NaN if a rank is lost."""
    layout, tokens = gather.layout, out_TH.shape[0]
    _check_values("out_TH", out_TH, layout, (torch.float32,), endpoint)
    if tokens == 0:
        return
    in_quads = decodes_in_quads(layout)
    tiles = tiles_of(layout.body, DECODE_TILE)
    _take_sums[(_programs(endpoint, tokens, tiles),)](
        endpoint.link(1),
        row_stride(layout.row_nbytes),
        _row(gather.scale_RD, 0),
        _row(gather.minimum_RD, 0),
        gather.body_index,
        gather.outlier_index,
        rows_as_bits(out_TH, rows=1),
        tokens,
        tiles,
        layout.body,
        layout.outliers,
        layout.group_size,
        MAGIC,
        F=format_of(layout, [_region(endpoint, 1, layout)]),
        GROUP=layout.group_size if in_quads else 0,
        IN_QUADS=in_quads,
        ADD=add,
        TILE=DECODE_TILE,
        HARDWARE=endpoint.on_gpu,
        num_warps=DECODE_TILE // 128,
        enable_fp_fusion=False,
    )


@dataclass(frozen=True)
class _Cut:
    """How encoding kernels cut a row: `parts` programs share it, in tiles of `tile` values."""

    any_layout: bool
    tile: int
    tiles: int
    parts: int
    part: int
    warps: int


def _cut(layout: PacketLayout, fast: bool, tile: int) -> _Cut:
    """As `encode` and `requantize` cut their work where a program takes one row."""
    size = layout.group_size
    if not fast:
        tiles = tiles_of(layout.body, ANY_TILE)
        part = min(triton.next_power_of_2(max(size, 1)), ANY_TILE)
        return _Cut(True, ANY_TILE, tiles, 1 if size else tiles, part, 4)
    judged = layout.row_scale_nbytes > 0
    tile = max(tile, size)
    if judged:
        tile = max(tile, min(triton.next_power_of_2(layout.body), JUDGED_TILE))
    tiles = tiles_of(layout.body, tile)
    return _Cut(False, tile, tiles, 1 if judged else tiles, 1, max(4, tile // 512))


def _check_values(
    name: str, values_TH: Tensor, layout: PacketLayout, dtypes: tuple[torch.dtype, ...], endpoint: Endpoint
) -> None:
    fits = values_TH.dim() == 2 and values_TH.shape[1] == layout.features and values_TH.dtype in dtypes
    adjacent = layout.features == 1 or (values_TH.dim() == 2 and values_TH.stride(1) == 1)
    if not fits or not adjacent or values_TH.device != endpoint.own.device:
        allowed = " or ".join(map(str, dtypes))
        raise ValueError(
            f"{name} is {values_TH.dtype} {tuple(values_TH.shape)} on {values_TH.device} with strides "
            f"{values_TH.stride()}; "
            f"expected {allowed} [T, {layout.features}] on {endpoint.own.device}, the values of a row adjacent"
        )


def _programs(endpoint: Endpoint, rows: int, parts: int) -> int:
    """`parts` for each of some rows: of all of them, or of as many as the device works on at once."""
    return parts * max(1, min(rows, triton.cdiv(endpoint.programs, parts)))


def _region(endpoint: Endpoint, which: int, layout: PacketLayout) -> Tensor:
    """A row of a region: its address and stride say how all of them are aligned."""
    return endpoint.region(which).as_strided((1, layout.row_nbytes), (row_stride(layout.row_nbytes), 1))


def _row(constants_RD: Tensor | None, sender: int) -> Tensor | None:
    return None if constants_RD is None else constants_RD[sender]
