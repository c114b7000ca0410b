"""Stored tensors: what a Hugging Face checkpoint of a model holds, put together from canonical tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from checkpoints_conv.row_blocks import check_finite, row_blocks
from megatron_lowbit.checkpoint.reader import CheckpointReader
from megatron_lowbit.checkpoint.stored_view import inner_shape, part_of, part_shape
from megatron_lowbit.sharding import TensorSource
from megatron_lowbit.stored import StoredPart

Parts = Mapping[str, StoredPart]


def stored_shapes(sources: Mapping[str, TensorSource], parts: Parts) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor, each where its first canonical tensor stands in `sources`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, source in sources.items():
        part = parts.get(name)
        if part is None:
            shapes[name] = source.shape
        else:
            assert part_shape(part) == source.shape, (name, part, source.shape)
            shapes[part.name] = part.shape
    numels: dict[str, int] = dict.fromkeys(shapes, 0)
    for name, source in sources.items():
        numels[parts[name].name if name in parts else name] += math.prod(source.shape)
    assert all(numels[name] == math.prod(shape) for name, shape in shapes.items()), "parts must cover stored tensors"
    return shapes


def stored_pieces(reader: CheckpointReader, name: str, parts: Parts, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The values of stored tensor `name` in row-major order, in pieces of `dtype`.

    A piece is a block of rows, or all that lies at one index of a tensor whose parts are transposed or interleaved.
    Raises ValueError naming the tensor where a value is not finite, or no longer is.
    """
    canonical = {key: part for key, part in parts.items() if part.name == name}
    if not canonical:
        for _, block in row_blocks(reader, name, dtype):
            yield block
        return
    indices = sorted({part.index for part in canonical.values()}, key=lambda index: index or 0)
    for index in indices:
        group = {key: part for key, part in canonical.items() if part.index == index}
        if all(part.step == 1 and not part.transposed for part in group.values()):
            for key in sorted(group, key=lambda key: group[key].start):
                for _, block in row_blocks(reader, key, dtype):
                    yield block
        else:
            yield _assembled(reader, group, dtype)


def _assembled(reader: CheckpointReader, group: Parts, dtype: torch.dtype) -> torch.Tensor:
    first = next(iter(group.values()))
    inner = torch.empty(inner_shape(first), dtype=dtype)
    for key, part in group.items():
        values = reader.read(key)
        converted = values.to(dtype)
        check_finite(reader, key, values, converted)
        part_of(inner, part).copy_(converted)
    return inner
