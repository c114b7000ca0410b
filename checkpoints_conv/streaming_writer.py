"""StreamingSafetensorsWriter: writes a .safetensors file piece by piece while computing its SHA-256."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from checkpoints_conv.lanes import Lanes
from megatron_lowbit.checkpoint.manifest import FileRecord

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
HEADER_ALIGNMENT = 8
WRITE_BACK_NBYTES = 8 << 20


class StreamingSafetensorsWriter:
    """Tensors of one dtype, their shapes known from the start, appended in that order in pieces of any size.

    Hashing is a job of lane `2 * number`, writing of the next one. Pieces must not change until the lanes are done with
    them. A context manager: leaving it closes the file; `finish`, once the lanes are drained, completes it.
    """

    def __init__(
        self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, lanes: Lanes, number: int
    ) -> None:
        self._dtype = dtype
        self._numels = [(name, math.prod(shape)) for name, shape in shapes.items()]
        self._position, self._written = 0, 0
        self._lanes, self._lane = lanes, 2 * number
        self._digest = hashlib.sha256()
        self._nbytes = 0
        self._file = path.open("xb", buffering=0)
        self._sent = 0
        """Bytes that the disk was asked to take."""
        self._emit(safetensors_header(shapes, dtype))

    def __enter__(self) -> StreamingSafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, name: str, piece: torch.Tensor) -> None:
        """The next values of tensor `name` in row-major order."""
        assert piece.dtype == self._dtype, (name, piece.dtype)
        self._skip_complete()
        if piece.numel() == 0:
            return
        assert self._numels[self._position][0] == name, (name, self._numels[self._position])
        self._written += piece.numel()
        assert self._written <= self._numels[self._position][1], name
        self._emit(piece.contiguous().flatten().view(torch.uint8).numpy().data)

    def sync(self) -> None:
        """Gives the job of bringing the file to the disk."""
        self._lanes.submit(self._lane, os.fsync, self._file.fileno())

    def finish(self) -> FileRecord:
        """Size and sum of the complete file."""
        self._skip_complete()
        assert self._position == len(self._numels), self._numels[self._position]
        return FileRecord(self._digest.hexdigest(), self._nbytes)

    def _skip_complete(self) -> None:
        while self._position < len(self._numels) and self._written == self._numels[self._position][1]:
            self._position, self._written = self._position + 1, 0

    def _emit(self, data: bytes | memoryview) -> None:
        self._nbytes += len(data)
        self._lanes.submit(self._lane, self._digest.update, data)
        self._lanes.submit(self._lane + 1, self._write, data)

    def _write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while len(rest):  # one call writes 2 GiB at most
            rest = rest[self._file.write(rest) :]
        self._start_write_back()

    def _start_write_back(self) -> None:
        """Lets the disk begin now, while later pieces are hashed; otherwise most of its work is left to `sync`."""
        written = self._file.tell()
        if hasattr(os, "posix_fadvise") and written - self._sent >= WRITE_BACK_NBYTES:
            # Linux starts to write such pages, and forgets only those that are on the disk
            os.posix_fadvise(self._file.fileno(), self._sent, written - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = written


def safetensors_header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """All bytes of a .safetensors file that come before its values."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
