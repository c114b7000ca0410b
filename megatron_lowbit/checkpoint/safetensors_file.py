"""SafetensorsFile: one .safetensors file, its header checked once, tensors read without mapping the file into memory.

The library's reader maps the file, so every page read counts as memory of the process; plain reads keep the peak at
the size of what was asked for, and let the errors name the file and the damage.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.checkpoint.reader import check_span

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MAX_HEADER_NBYTES = 100_000_000
LENGTH_NBYTES = 8
ROW_BLOCK_NBYTES = 16 << 20


@dataclass(frozen=True)
class StoredTensor:
    """`offset` counts bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """The tensors of one file. Raises FileNotFoundError, or ValueError naming the file and what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = _read_header(path)

    def read(self, name: str) -> torch.Tensor:
        stored = self.tensors[name]
        with self.path.open("rb") as file:
            return self._read_at(file, stored, stored.offset, stored.shape)

    def read_span(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """`[start, stop)` along `dim`: only those bytes for dimension 0, otherwise by blocks of rows."""
        stored = self.tensors[name]
        shape = check_span(name, stored.shape, dim, start, stop)
        if shape == stored.shape:
            return self.read(name)
        if 0 in shape:
            return torch.empty(shape, dtype=stored.dtype)
        row_shape = stored.shape[1:]
        row_nbytes = math.prod(row_shape) * stored.dtype.itemsize
        with self.path.open("rb") as file:
            if dim == 0:
                return self._read_at(file, stored, stored.offset + start * row_nbytes, shape)
            out = torch.empty(shape, dtype=stored.dtype)
            block = max(1, ROW_BLOCK_NBYTES // row_nbytes)
            for first in range(0, shape[0], block):
                count = min(block, shape[0] - first)
                rows = self._read_at(file, stored, stored.offset + first * row_nbytes, (count, *row_shape))
                out[first : first + count] = rows.narrow(dim, start, stop - start)
            return out

    def _read_at(
        self, file: io.BufferedReader, stored: StoredTensor, offset: int, shape: tuple[int, ...]
    ) -> torch.Tensor:
        buffer = torch.empty(math.prod(shape) * stored.dtype.itemsize, dtype=torch.uint8)
        file.seek(offset)
        if buffer.numel() and file.readinto(buffer.numpy().data) != buffer.numel():
            raise ValueError(f"{self.path}: the file became shorter while it was read; is it still being written?")
        return buffer.view(stored.dtype).reshape(shape)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file; download or convert the checkpoint again")
    file_nbytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(LENGTH_NBYTES)
        header_nbytes = int.from_bytes(prefix, "little")
        data_start = LENGTH_NBYTES + header_nbytes
        if len(prefix) < LENGTH_NBYTES or data_start > file_nbytes or header_nbytes > MAX_HEADER_NBYTES:
            raise _damaged(path, f"its header is cut off or not a safetensors header ({file_nbytes} bytes in all)")
        text = file.read(header_nbytes)
    try:
        header: Any = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a table of tensors")
    tensors = {name: _stored(path, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"}
    end = data_start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != end:
            raise _damaged(path, f"tensor {name} starts at byte {stored.offset}, expected {end}")
        end += stored.nbytes
    if end != file_nbytes:
        raise _damaged(path, f"it has {file_nbytes} bytes, its header describes {end}")
    return tensors


def _stored(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the header entry of tensor {name} is incomplete") from error
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _damaged(path, f"the header entry of tensor {name} has an invalid shape or offset")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{path}: tensor {name} has the data type {kind!r}; known types: {sorted(DTYPES)}")
    stored = StoredTensor(DTYPES[kind], tuple(shape), data_start + begin)
    if end - begin != stored.nbytes:
        raise _damaged(path, f"tensor {name} of shape {stored.shape} and type {kind} takes {end - begin} bytes")
    return stored


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: damaged or truncated safetensors file: {what}; download or convert it again")
