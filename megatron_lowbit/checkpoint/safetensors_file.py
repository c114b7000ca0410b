"""SafetensorsFile: one .safetensors file, its header checked once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.checkpoint.json_file import parse_json
from megatron_lowbit.checkpoint.tensor_file import StoredTensor, TensorFile, is_addressable

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


class SafetensorsFile(TensorFile):
    """The tensors of one file. Raises FileNotFoundError, or ValueError naming the file and what is wrong with it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _read_header(path))


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
        header: Any = parse_json(text)
    except (ValueError, RecursionError) as error:
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
    if not is_addressable(stored.shape):
        raise _damaged(path, f"tensor {name} has the impossible shape {stored.shape}")
    if end - begin != stored.nbytes:
        raise _damaged(path, f"tensor {name} of shape {stored.shape} and type {kind} takes {end - begin} bytes")
    return stored


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: damaged or truncated safetensors file: {what}; download or convert it again")
