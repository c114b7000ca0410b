"""Blocks of rows: tensors of a checkpoint in pieces of some MB, converted and checked; what each rank holds of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_lowbit.checkpoint.reader import CheckpointReader
from megatron_lowbit.sharding import TensorSource

BLOCK_NBYTES = 4 << 20  # so small that the allocator hands out the same memory again, and a core's cache has some of it


@dataclass(frozen=True)
class _Bits:
    """Smallest bit pattern of an infinity or NaN: of a positive one read as signed, of a negative one as unsigned."""

    signed: type[np.signedinteger]
    unsigned: type[np.unsignedinteger]
    positive: int
    negative: int


BITS = {
    torch.bfloat16: _Bits(np.int16, np.uint16, 0x7F80, 0xFF80),
    torch.float16: _Bits(np.int16, np.uint16, 0x7C00, 0xFC00),
    torch.float32: _Bits(np.int32, np.uint32, 0x7F800000, 0xFF800000),
}


def row_blocks(reader: CheckpointReader, name: str, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows in `dtype`) of a full tensor, in order, each as large as BLOCK_NBYTES in the wider of the types.

    Raises ValueError naming the tensor where a value is not finite, or no longer is.
    """
    shape = reader.shape(name)
    itemsize = max(reader.dtype(name).itemsize, dtype.itemsize)
    count = max(1, BLOCK_NBYTES // (math.prod(shape[1:]) * itemsize))
    for first_row in range(0, shape[0], count):
        block = reader.read_span(name, 0, first_row, min(first_row + count, shape[0]))
        converted = block.to(dtype)
        check_finite(reader, name, block, converted)
        yield first_row, converted


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite, from its bits: two passes that make nothing."""
    bits = BITS[values.dtype]
    if not values.numel():
        return True
    raw = values.view(torch.int16 if values.dtype.itemsize == 2 else torch.int32).numpy()
    return bool(raw.view(bits.signed).max() < bits.positive and raw.view(bits.unsigned).max() < bits.negative)


def part_of_rank(source: TensorSource, block: torch.Tensor, first_row: int, rank: int, tp: int) -> torch.Tensor:
    """What `rank` holds of a block of rows that starts at `first_row` of the full tensor."""
    rule = source.rule
    if rule.dim is None:
        return block
    start, stop = rule.span(rank, tp)
    if rule.dim > 0:
        return block.narrow(rule.dim, start, stop - start)
    start, stop = max(start - first_row, 0), min(stop - first_row, block.shape[0])
    return block[start : max(start, stop)]


def check_finite(reader: CheckpointReader, name: str, block: torch.Tensor, converted: torch.Tensor) -> None:
    """Raises ValueError naming the tensor where a value of `converted`, made of `block`, is not finite."""
    if not all_finite(converted):
        bad = int((~torch.isfinite(converted)).sum())
        overflow = " after conversion (they were finite before)" if bool(torch.isfinite(block).all()) else ""
        raise ValueError(
            f"{reader.directory}: tensor {name} holds {bad} values that are NaN or infinite{overflow}; "
            "the checkpoint is damaged or was saved from a diverged run"
        )
