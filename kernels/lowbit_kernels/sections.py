"""Triton: where the sections of a packet row lie, worked out on the device from the sizes of a layout.

Beyond that, the sizes are few numbers: fewer arguments to a launch, and none that Triton would compile into a kernel of
its own for each layout.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Row(NamedTuple):
    """Sizes of a row and bytes where its sections lie, as in `PacketLayout`: scalars on the device."""

    body: tl.tensor
    outliers: tl.tensor
    group_size: tl.tensor
    groups: tl.tensor
    second_plane: tl.tensor
    third_plane: tl.tensor
    codes_end: tl.tensor
    row_scale: tl.tensor
    scales: tl.tensor
    scales_end: tl.tensor
    minimums: tl.tensor
    outliers_start: tl.tensor
    magic: tl.tensor  # see quads.py


@triton.jit
def sections_of(body: tl.tensor, outliers: tl.tensor, group_size: tl.tensor, magic: tl.tensor, F: tl.constexpr) -> Row:
    """The sections of a layout of these sizes; `group_size` is read where there are groups."""
    FIRST: tl.constexpr = 4 if F.bits > 4 else 2
    SECOND: tl.constexpr = 2 if F.bits > 5 else 1
    second_plane = (body * FIRST + 7) // 8
    third_plane = second_plane + (body * SECOND + 7) // 8
    if F.planes == 3:
        codes_end = third_plane + (body + 7) // 8
    elif F.planes == 2:
        codes_end = third_plane
    else:
        codes_end = (body * F.bits + 7) // 8
    row_scale = (codes_end + 1) // 2 * 2
    groups = body * 0
    scales = row_scale
    scales_end = row_scale
    minimums = row_scale
    if F.grouped:
        groups = (body + group_size - 1) // group_size
        if F.scales == "bf16":
            scales_end = scales + 2 * groups
        elif F.scales == "e8m0":
            scales = codes_end
            scales_end = scales + groups
        else:
            scales = row_scale + 2
            scales_end = scales + groups
        minimums = (scales_end + 1) // 2 * 2
    outliers_start = minimums
    if F.grouped and F.asymmetric:
        outliers_start = minimums + 2 * groups
    return Row(
        body,
        outliers,
        group_size,
        groups,
        second_plane,
        third_plane,
        codes_end,
        row_scale,
        scales,
        scales_end,
        minimums,
        outliers_start,
        magic,
    )


@triton.jit
def end_of_row(count: tl.tensor, token: tl.tensor, tokens: tl.tensor) -> tl.tensor:
    """`count` (a scalar) in rows that exist, 0 in those at `tokens` or behind: what masks are compared with."""
    return tl.where(token < tokens, count, 0)
