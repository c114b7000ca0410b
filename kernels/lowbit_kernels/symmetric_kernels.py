"""Triton: the three kernels of an all-reduce between GPUs that can address each other. `symmetric.py` launches them.

Each is the kernel of `encode.py`, `requantize.py` or `decode_sum.py`, row by row, between a wait and a signal of
`symmetric_signals.py`. Those kernels take their row from their program's number, `here`; they are made to work on
another one by moving the pointers that they are given. A program takes rows in turns, so that there are few programs,
however many rows: each looks at flags and takes a ticket, which costs as much as a row.

A rank's buffer holds two rows of flags, then two regions of packet rows, which start at multiples of 16 bytes: so they
can be copied in the widest stores, whatever the length of a row. In the first region lie the packets
of all ranks, in rank order, for the tokens that this rank owns; in the second one the sums of all tokens. The one is
written in stage 1 and read in stage 2, the other written in stage 2 and read in stage 3, and neither is written before
all have read it: to get to its next stage 1, a rank has seen that all have ended stage 2; to get to its next stage 2,
that all have begun their next stage 1, and so ended stage 3. That is why one buffer is enough, call after call.

Legend: T tokens, R ranks. F is a `rows.Format`.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.decode_sum import _decode_sum
from lowbit_kernels.encode import _encode
from lowbit_kernels.encode_any import _encode_any
from lowbit_kernels.pack import NAN_BITS
from lowbit_kernels.requantize import _requantize
from lowbit_kernels.rows import Rows, Source, Target
from lowbit_kernels.symmetric_signals import EPOCH, MAX_RANKS, TICKET, is_last, owner_of, signal, wait

#: Bytes of a row of flags; of both, where the first region starts.
FLAGS_NBYTES = tl.constexpr(4 * MAX_RANKS)
HEADER_NBYTES = tl.constexpr(8 * MAX_RANKS)
#: Words that are copied at a time: 16 bytes or more for each thread of the largest program.
COPY_TILE = tl.constexpr(2048)


#: Numbers that change from message to message, or from layout to layout, without a kernel of their own.
_SIZES = ("tokens", "parts", "tiles", "body", "outliers", "group_size", "magic")
_SOURCE_SIZES = ("source_body", "source_outliers", "source_group_size")


class Link(NamedTuple):
    """The buffers as one rank's kernels see them.

    own: this rank's; table: int64 addresses of all; state, tickets: int32, of this rank alone, one ticket a row it may
    own; status: int32, one a rank, of the stage that is waited for; region_nbytes: from one region to the next.
    """

    own: Tensor
    table: Tensor
    state: Tensor
    tickets: Tensor
    status: Tensor
    region_nbytes: int
    rank: int
    ranks: int
    timeout_ns: int


@triton.jit(do_not_specialize=_SIZES)
def _push_partials(
    link: Link,
    x: Rows,
    stride: tl.tensor,
    inverse_scale: tl.tensor,
    minimum: tl.tensor,
    body_index: tl.tensor,
    outlier_index: tl.tensor,
    tokens: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,
    body: tl.tensor,
    outliers: tl.tensor,
    group_size: tl.tensor,
    magic: tl.tensor,
    FETCHED: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    IS_BF16: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    WHOLE: tl.constexpr,
    ANY: tl.constexpr,
    HARDWARE: tl.constexpr,
) -> None:
    """Stage 1: encode all tokens of `x`, each into the buffer of its owner. `parts` programs share a row."""
    epoch = tl.load(link.state + EPOCH) + 1
    here = tl.program_id(0) // parts
    for token in range(here, tokens, tl.num_programs(0) // parts):
        owner, first, count = owner_of(token, tokens, link.ranks)
        row = (link.rank * count + token - first - here).to(tl.int64)
        packet = _buffer_of(link, owner) + (HEADER_NBYTES + row * stride)
        target = Target(packet, stride, inverse_scale, minimum)
        moved = Rows(x.data + (token - here).to(tl.int64) * x.stride, x.stride)
        if ANY:
            _encode_any(
                moved, None, 0, 0, 0, target, body_index, outlier_index, tiles, body, outliers, group_size,
                FETCHED, F, PART, TILE,
            )  # fmt: skip
        else:
            _encode(
                moved, target, body_index, outlier_index, here + 1, tiles, body, outliers, group_size, magic,
                F, GROUP, IS_BF16, 1, TILE, WHOLE,
            )  # fmt: skip
    if is_last(link.state + TICKET, tl.num_programs(0), "sys"):
        signal(link.state, link.table, 4 * link.rank, epoch, link.ranks, HARDWARE)


@triton.jit(do_not_specialize=(*_SIZES, *_SOURCE_SIZES))
def _push_sums(
    link: Link,
    stride: tl.tensor,
    scale: tl.tensor,
    scale_stride: tl.tensor,
    minimum: tl.tensor,
    minimum_stride: tl.tensor,
    source_outlier_index: tl.tensor,
    source_body: tl.tensor,
    source_outliers: tl.tensor,
    source_group_size: tl.tensor,
    gather_stride: tl.tensor,
    gather_inverse_scale: tl.tensor,
    gather_minimum: tl.tensor,
    body_index: tl.tensor,
    outlier_index: tl.tensor,
    tokens: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,
    body: tl.tensor,
    outliers: tl.tensor,
    group_size: tl.tensor,
    magic: tl.tensor,
    FETCHED: tl.constexpr,
    SOURCE: tl.constexpr,
    SOURCE_GROUP: tl.constexpr,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    RANKS: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
    WHOLE: tl.constexpr,
    ANY: tl.constexpr,
    HARDWARE: tl.constexpr,
) -> None:
    """Stage 2: sum the packets of the tokens this rank owns, encode the sums, copy the packets to all other ranks."""
    epoch = tl.load(link.state + EPOCH) + 1
    flags = link.own.to(tl.int64)
    if wait(flags, link.state, link.status, epoch, link.ranks, link.timeout_ns, HARDWARE):
        here = tl.program_id(0) // parts
        short = tokens // link.ranks
        longer = tokens % link.ranks
        first = link.rank * short + tl.minimum(link.rank, longer)
        count = short + (link.rank < longer).to(tl.int32)
        for row in range(here, count, tl.num_programs(0) // parts):
            packets = ()
            strides = ()
            for r in tl.static_range(RANKS):
                packet = link.own + HEADER_NBYTES + (r * count + row - here).to(tl.int64) * stride
                packets = packets + (packet,)  # type: ignore[assignment]  # noqa: RUF005
                strides = strides + (stride,)  # type: ignore[assignment]  # noqa: RUF005
            source = Source(packets, strides, scale, scale_stride, minimum, minimum_stride)
            offset = HEADER_NBYTES + link.region_nbytes + (first + row).to(tl.int64) * gather_stride
            packet = link.own + (offset - here.to(tl.int64) * gather_stride)
            target = Target(packet, gather_stride, gather_inverse_scale, gather_minimum)
            if ANY:
                _encode_any(
                    source, source_outlier_index, source_body, source_outliers, source_group_size,
                    target, body_index, outlier_index, tiles, body, outliers, group_size,
                    FETCHED, F, PART, TILE,
                )  # fmt: skip
            else:
                _requantize(
                    source, source_group_size, target, body_index, here + 1, tiles, body, outliers, group_size, magic,
                    SOURCE, SOURCE_GROUP, F, GROUP, RANKS, 1, TILE, WHOLE,
                )  # fmt: skip
            if is_last(link.tickets + row, parts, "gpu"):  # of the programs that share the row
                _copy_to_others(link, offset, gather_stride)
    if is_last(link.state + TICKET, tl.num_programs(0), "sys"):
        signal(link.state, link.table, FLAGS_NBYTES + 4 * link.rank, epoch, link.ranks, HARDWARE)


@triton.jit
def _copy_to_others(link: Link, offset: tl.tensor, nbytes: tl.tensor) -> None:
    """Copy `nbytes` bytes from `offset` bytes into the own buffer to the same place in all others; multiples of 16."""
    words = nbytes // 4
    for start in range(0, words, COPY_TILE):
        word = start + tl.arange(0, COPY_TILE)
        content = tl.load((link.own + offset).to(tl.pointer_type(tl.int32)) + word, mask=word < words, other=0)
        for step in range(1, link.ranks):  # each rank begins with the one behind it, so that they do not queue
            peer = (link.rank + step) % link.ranks
            there = _buffer_of(link, peer) + offset
            tl.store(there.to(tl.pointer_type(tl.int32)) + word, content, mask=word < words)


@triton.jit
def _buffer_of(link: Link, rank: tl.tensor) -> tl.tensor:
    """Where another rank's buffer starts: like all of them at a multiple of 16, which makes for wide stores."""
    return tl.multiple_of(tl.load(link.table + rank).to(tl.pointer_type(tl.uint8)), 16)


@triton.jit(do_not_specialize=_SIZES)
def _take_sums(
    link: Link,
    stride: tl.tensor,
    scale: tl.tensor,
    minimum: tl.tensor,
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
    TILE: tl.constexpr,
    HARDWARE: tl.constexpr,
) -> None:
    """Stage 3: decode the sums of all tokens into `out`, or add them to it; NaN where they did not come in time."""
    epoch = tl.load(link.state + EPOCH) + 1
    flags = link.own.to(tl.int64) + FLAGS_NBYTES
    reached = wait(flags, link.state, link.status, epoch, link.ranks, link.timeout_ns, HARDWARE)
    here = tl.program_id(0) // tiles
    for token in range(here, tokens, tl.num_programs(0) // tiles):
        shift = (token - here).to(tl.int64)
        moved = Rows(out.data + shift * out.stride, out.stride)
        if reached:
            packet = link.own + (HEADER_NBYTES + link.region_nbytes + shift * stride)
            source = Source((packet,), (stride,), scale, 0, minimum, 0)
            _decode_sum(
                source, body_index, outlier_index, moved, here + 1, tiles, body, outliers, group_size, magic,
                F, GROUP, IN_QUADS, ADD, 1, 1, TILE,
            )  # fmt: skip
        else:  # the whole row: which features a tile has depends on the outliers
            row = moved.data + here.to(tl.int64) * out.stride
            for start in range(0, body + outliers, TILE):
                feature = start + tl.arange(0, TILE)
                nan = tl.full((TILE,), NAN_BITS, tl.int32)
                tl.store(row + feature, nan, mask=feature < body + outliers)
    if is_last(link.state + TICKET, tl.num_programs(0), "gpu"):
        tl.store(link.state + EPOCH, epoch)
