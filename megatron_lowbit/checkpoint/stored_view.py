"""StoredView: the tensors of a checkpoint by canonical name, though its files merge, rename or transpose them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from megatron_lowbit.checkpoint.reader import check_span, shown
from megatron_lowbit.checkpoint.tensor_file import ROW_BLOCK_NBYTES, StoredTensor
from megatron_lowbit.stored import StoredPart


class ReadableFile(Protocol):
    """What a checkpoint asks of the file that holds a tensor; TensorFile is one."""

    path: Path
    tensors: dict[str, StoredTensor]

    def read(self, name: str) -> torch.Tensor: ...

    def read_span(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor: ...


class StoredView:
    """files: which file holds each stored tensor. parts: where canonical tensors lie that are not stored by themselves.

    Raises ValueError naming the stored tensor where one that `parts` speaks of is missing or has another shape. What
    remains is presented under its stored name, for `check_complete` to judge.
    """

    def __init__(self, directory: Path, files: Mapping[str, ReadableFile], parts: Mapping[str, StoredPart]) -> None:
        self._files, self._parts = files, parts
        stored = {part.name: part.shape for part in parts.values()}
        missing = [name for name in stored if name not in files]
        if missing:
            raise ValueError(
                f"{directory}: {len(missing)} of {len(stored)} merged tensors are missing ({shown(missing)}); expected "
                f"{missing[0]} with shape {stored[missing[0]]}. Check that config.json belongs to these weights and "
                "that the download is complete"
            )
        for name, shape in stored.items():
            found = files[name].tensors[name].shape
            if found != shape:
                raise ValueError(
                    f"{directory}: tensor {name} has shape {found}, expected {shape} from its config.json; use the "
                    "config that belongs to these weights"
                )
        both = sorted(name for name in files if name in parts and name not in stored)
        if both:
            raise ValueError(
                f"{directory}: {len(both)} tensors have no place beside those that hold the same ({shown(both)}; "
                f"expected in {parts[both[0]].name}); download the weights again"
            )
        self._names = {*parts, *(name for name in files if name not in stored)}
        self._slice: tuple[tuple[str, int | None], torch.Tensor] | None = None

    def names(self) -> set[str]:
        return set(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        part = self._parts.get(name)
        return self._files[name].tensors[name].shape if part is None else part_shape(part)

    def dtype(self, name: str) -> torch.dtype:
        stored = self._stored_name(name)
        return self._files[stored].tensors[stored].dtype

    def read(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        if name in self._parts and shape:
            return self.read_span(name, 0, 0, shape[0])
        return self._files[name].read(name)

    def read_span(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """`full.narrow(dim, start, stop - start)`, contiguous and the caller's own."""
        part = self._parts.get(name)
        if part is None:
            return self._files[name].read_span(name, dim, start, stop)
        shape = check_span(name, part_shape(part), dim, start, stop)
        if 0 in shape:
            return torch.empty(shape, dtype=self.dtype(name))
        if part.index is not None or part.transposed:
            span = part_of(self._inner(part), part).narrow(dim, start, stop - start)
            return span.clone(memory_format=torch.contiguous_format)
        if dim == 0:
            first, last = part.start + start * part.step, part.start + (stop - 1) * part.step + 1
            rows = self._files[part.name].read_span(part.name, 0, first, last)
            return rows if part.step == 1 else rows[:: part.step].contiguous()
        return self._columns(name, shape, dim, start, stop)

    def _columns(self, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int) -> torch.Tensor:
        """A span along another dimension than 0, by blocks of rows."""
        out = torch.empty(shape, dtype=self.dtype(name))
        block = max(1, ROW_BLOCK_NBYTES // (math.prod(self.shape(name)[1:]) * out.dtype.itemsize))
        for first in range(0, shape[0], block):
            rows = self.read_span(name, 0, first, min(first + block, shape[0]))
            out[first : first + block] = rows.narrow(dim, start, stop - start)
        return out

    def _inner(self, part: StoredPart) -> torch.Tensor:
        """The stored tensor, or its slice at `index`. The last one stays: its parts are asked for one after another."""
        key = part.name, part.index
        if self._slice is None or self._slice[0] != key:
            self._slice = None
            file = self._files[part.name]
            if part.index is None:
                inner = file.read(part.name)
            else:
                inner = file.read_span(part.name, 0, part.index, part.index + 1)[0]
            self._slice = key, inner
        return self._slice[1]

    def _stored_name(self, name: str) -> str:
        return self._parts[name].name if name in self._parts else name


def inner_shape(part: StoredPart) -> tuple[int, ...]:
    """Shape of the stored tensor without the dimension that `index` fixes."""
    return part.shape if part.index is None else part.shape[1:]


def part_shape(part: StoredPart) -> tuple[int, ...]:
    """Shape of the canonical tensor."""
    shape = inner_shape(part)
    rows, *rest = reversed(shape) if part.transposed else shape
    return (len(range(*slice(part.start, part.stop, part.step).indices(rows))), *rest)


def part_of(inner: torch.Tensor, part: StoredPart) -> torch.Tensor:
    """The canonical tensor as a view of what is stored at `index`: to read from it, or to write into it."""
    seen = inner.t() if part.transposed else inner
    return seen[part.start : part.stop : part.step]
