"""Triton: the codes of trellis-coded values, see `reference_trellis.py`, put where a packet has other codes.

`encode.py` writes all of a packet but its codes, in the format of "lm", whose scales, outliers and gaps are the same.
Then `_search` finds the codes of groups, each by one thread, with the scales read back from the packet; and `_pack`
writes them into the planes. What they hand on lies in `[S, N]`, so that threads beside each other read and write beside
each other.

Legend: T tokens, N groups of all rows, S values of a group, B bytes of a row.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.encode_any import TILE, store_planes
from lowbit_kernels.fetch import Fetch, Fetched, fetch_values
from lowbit_kernels.group_scales import load_row_scale, load_scale, scale_value
from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.pack import as_float
from lowbit_kernels.rows import Rows, Target, format_of, rows_as_bits, target_of, tiles_of
from lowbit_kernels.sections import sections_of

#: Groups of a program of `_search`, one for each thread.
LANES = 128


def put_trellis_codes(
    x_TH: Tensor, layout: PacketLayout, packet_TB: Tensor, inverse_scale: Tensor | None, body_index: Tensor | None
) -> None:
    """Write the codes of `x_TH` into `packet_TB`, which has its scales already. The arguments have been checked."""
    tokens, groups = x_TH.shape[0], layout.groups
    if tokens * groups == 0:
        return
    whole, rest = divmod(layout.body, layout.group_size)
    count = tokens * groups
    work_SN = torch.empty(layout.group_size if whole else rest, count, dtype=torch.int32, device=x_TH.device)
    packet_format = format_of(layout, [packet_TB])
    target = target_of(packet_TB, layout, inverse_scale, None, rows=1)
    sizes = layout.body, layout.outliers, layout.group_size
    for first, of_row, size in ((0, whole, layout.group_size), (whole, 1, rest)):
        if of_row * size:
            _search[(triton.cdiv(tokens * of_row, LANES),)](
                rows_as_bits(x_TH, rows=1),
                target,
                body_index,
                work_SN,
                tokens * of_row,
                first,
                of_row,
                size,
                *sizes,
                S=Fetched(0, None, x_TH.dtype == torch.bfloat16),
                F=packet_format,
                LANES=LANES,
                num_warps=LANES // 32,
                enable_fp_fusion=False,  # costs are sums of rounded squares
            )
    tiles = tiles_of(layout.body, TILE)
    _pack[(tokens * tiles,)](
        target, work_SN, count, tiles, *sizes, F=packet_format, TILE=TILE, num_warps=4, enable_fp_fusion=False
    )


@triton.jit(do_not_specialize=["count", "first", "of_row", "size", "body", "outliers", "group_size"])
def _search(
    x: Rows,
    target: Target,
    body_index: tl.tensor,
    work: tl.tensor,
    count: tl.tensor,
    first: tl.tensor,
    of_row: tl.tensor,
    size: tl.tensor,
    body: tl.tensor,
    outliers: tl.tensor,
    group_size: tl.tensor,
    S: tl.constexpr,
    F: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """The codes of `count` groups of `size` values, `of_row` of each row from `first` on, into `work` `[S, N]`, int32.

    On the way there it has for each value, in a word, what its code will be told from: bit s says that of the two
    states before state s the one of higher number is the better, and 3 bits from bit 8 + 3 k on say which level of
    subset k is the nearest.
    """
    at = sections_of(body, outliers, group_size, 0, F)
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    here = lane < count
    token = lane // of_row
    group = first + (lane % of_row).to(tl.int32)
    row = target.packet + token * target.stride
    row_scale = 0.0
    if F.scales == "e4m3":
        row_scale = load_row_scale(row, here, at)
    scale = scale_value(load_scale(row, group, here, at, F), row_scale, F)
    lost = scale != scale
    inverse = tl.div_rn(1.0, scale)
    fetch = Fetch(x, body_index, at, body_index, target.inverse_scale)
    groups = count // of_row * at.groups  # N
    word_ptr = work + token * at.groups + group
    c0 = tl.zeros((LANES,), tl.float32)
    c1 = c0 + float("inf")
    c2 = c1
    c3 = c1
    c4 = c1
    c5 = c1
    c6 = c1
    c7 = c1
    for t in range(0, size):
        product = as_float(fetch_values(fetch, token, group * at.group_size + t, here, S, F)) * inverse
        product = tl.where(lost, 0.0, product)
        d0, near0 = _nearest(product, 0, F)
        d1, near1 = _nearest(product, 1, F)
        d2, near2 = _nearest(product, 2, F)
        d3, near3 = _nearest(product, 3, F)
        word = near0 << 8 | near1 << 11 | near2 << 14 | near3 << 17
        n0, word = _better(c0 + d0, c4 + d2, 0, word)
        n1, word = _better(c0 + d2, c4 + d0, 1, word)
        n2, word = _better(c1 + d1, c5 + d3, 2, word)
        n3, word = _better(c1 + d3, c5 + d1, 3, word)
        n4, word = _better(c2 + d2, c6 + d0, 4, word)
        n5, word = _better(c2 + d0, c6 + d2, 5, word)
        n6, word = _better(c3 + d3, c7 + d1, 6, word)
        n7, word = _better(c3 + d1, c7 + d3, 7, word)
        c0, c1, c2, c3, c4, c5, c6, c7 = n0, n1, n2, n3, n4, n5, n6, n7
        tl.store(word_ptr, word, mask=here)
        word_ptr += groups
    state = tl.zeros((LANES,), tl.int32)
    state, c0 = _lower(state, c0, 1, c1)
    state, c0 = _lower(state, c0, 2, c2)
    state, c0 = _lower(state, c0, 3, c3)
    state, c0 = _lower(state, c0, 4, c4)
    state, c0 = _lower(state, c0, 5, c5)
    state, c0 = _lower(state, c0, 6, c6)
    state, c0 = _lower(state, c0, 7, c7)
    tl.debug_barrier()  # words that threads wrote may be read by others
    for _ in range(0, size):
        word_ptr -= groups
        word = tl.load(word_ptr, mask=here, other=0)
        bit = state & 1
        before = state >> 1 | ((word >> state) & 1) << 2
        subset = 2 * ((bit ^ before >> 1 ^ before >> 2) & 1) + (before & 1)
        code = ((word >> (8 + 3 * subset)) & 7) << 1 | bit
        tl.store(word_ptr, tl.where(lost, 0, code), mask=here)
        state = before


@triton.jit
def _nearest(x: tl.tensor, SUBSET: tl.constexpr, F: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The squared distance to the nearest level of a subset, and which one it is; the lower one of two."""
    near = tl.zeros(x.shape, tl.int32)
    level = tl.full(x.shape, F.levels[SUBSET], tl.float32)
    for k in tl.static_range(1, 2 ** (F.bits - 1)):
        above = x > (F.levels[4 * k - 4 + SUBSET] + F.levels[4 * k + SUBSET]) / 2
        near = tl.where(above, k, near)
        level = tl.where(above, F.levels[4 * k + SUBSET], level)
    error = x - level
    return error * error, near


@triton.jit
def _better(low: tl.tensor, high: tl.tensor, STATE: tl.constexpr, word: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The lower cost of two ways to a state, and `word` with the bit that says which it is."""
    is_high = high < low
    return tl.where(is_high, high, low), word | is_high.to(tl.int32) << STATE


@triton.jit
def _lower(
    state: tl.tensor, cost: tl.tensor, other_state: tl.constexpr, other_cost: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The state of lower cost, the first one of equal ones, and its cost."""
    is_other = other_cost < cost
    return tl.where(is_other, other_state, state), tl.where(is_other, other_cost, cost)


@triton.jit(do_not_specialize=["count", "tiles", "body", "outliers", "group_size"])
def _pack(
    target: Target,
    work: tl.tensor,
    count: tl.tensor,
    tiles: tl.tensor,
    body: tl.tensor,
    outliers: tl.tensor,
    group_size: tl.tensor,
    F: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Codes of `_search` into the planes of rows: one program is one tile of one row."""
    at = sections_of(body, outliers, group_size, 0, F)
    program = tl.program_id(0)
    token = (program // tiles).to(tl.int64)
    start = program % tiles * TILE
    value = start + tl.arange(0, TILE)
    n = token * at.groups + value // at.group_size
    place = (value % at.group_size).to(tl.int64) * count + n
    code = tl.load(work + place, mask=value < at.body, other=0)
    store_planes(target.packet + token * target.stride, start, code, at, F)
