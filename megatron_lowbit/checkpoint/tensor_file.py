"""TensorFile: tensors that lie in a file as plain bytes, read without mapping the file into memory.

Mapped pages count as memory of the process; plain reads keep the peak at the size of what was asked for, and let the
errors name the file and the damage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_lowbit.checkpoint.reader import check_span

ROW_BLOCK_NBYTES = 16 << 20
# what torch can still make; a shape beyond is damage, even where one extent is 0
MAX_ELEMENTS = 1 << 60
MAX_DIMS = 16


@dataclass(frozen=True)
class StoredTensor:
    """`offset` counts bytes from the start of the file. strides: in elements, None for row-major order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def is_addressable(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape can be made at all."""
    return len(shape) <= MAX_DIMS and math.prod(max(1, extent) for extent in shape) < MAX_ELEMENTS


class TensorFile:
    """The tensors of one file by the names it gives them."""

    def __init__(self, path: Path, tensors: dict[str, StoredTensor]) -> None:
        self.path = path
        self.tensors = tensors
        self._ordered: tuple[str, torch.Tensor] | None = None

    def read(self, name: str) -> torch.Tensor:
        """The full tensor."""
        shape = self.tensors[name].shape
        return self.read_rows(name, 0, math.prod(shape), ()).reshape(shape)

    def read_span(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """`[start, stop)` along `dim`: only those bytes for dimension 0, otherwise by blocks of rows."""
        stored = self.tensors[name]
        shape = check_span(name, stored.shape, dim, start, stop)
        if shape == stored.shape:
            return self.read(name)
        if 0 in shape:
            return torch.empty(shape, dtype=stored.dtype)
        row_shape = stored.shape[1:]
        if dim == 0:
            return self.read_rows(name, start, stop - start, row_shape)
        out = torch.empty(shape, dtype=stored.dtype)
        block = max(1, ROW_BLOCK_NBYTES // (math.prod(row_shape) * stored.dtype.itemsize))
        for first in range(0, shape[0], block):
            count = min(block, shape[0] - first)
            rows = self.read_rows(name, first, count, row_shape)
            out[first : first + count] = rows.narrow(dim, start, stop - start)
        return out

    def read_rows(self, name: str, first: int, count: int, row_shape: tuple[int, ...]) -> torch.Tensor:
        """`[count, *row_shape]`: rows from `first` on of the tensor seen as `[*, *row_shape]`, in row-major order."""
        stored = self.tensors[name]
        width = math.prod(row_shape)
        assert first >= 0 and (first + count) * width <= math.prod(stored.shape), (name, first, count)
        if stored.strides is not None:
            values = self._in_order(name, stored, stored.strides).flatten()
            return values[first * width : (first + count) * width].reshape(count, *row_shape).clone()
        values = self._read_at(stored.offset + first * width * stored.dtype.itemsize, count * width, stored.dtype)
        return values.reshape(count, *row_shape)

    def _in_order(self, name: str, stored: StoredTensor, strides: tuple[int, ...]) -> torch.Tensor:
        """The tensor in row-major order. The last one stays, since its rows are asked for block by block."""
        if self._ordered is None or self._ordered[0] != name:
            self._ordered = None
            values = self._read_at(stored.offset, math.prod(stored.shape), stored.dtype)
            self._ordered = name, values.as_strided(stored.shape, strides).contiguous()
        return self._ordered[1]

    def _read_at(self, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        # unbuffered: what is read is large, and goes straight where it belongs
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            rest = buffer.numpy().data
            while len(rest):  # one call reads 2 GiB at most
                nbytes = file.readinto(rest)
                if not nbytes:
                    raise ValueError(
                        f"{self.path}: the file became shorter while it was read; is it still being written?"
                    )
                rest = rest[nbytes:]
        return buffer.view(dtype)
