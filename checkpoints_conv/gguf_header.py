"""GGUFHeader: metadata and tensor table of a GGUF file, with every length checked against the file.

The gguf package's reader trusts the counts it finds, so a damaged file can keep it busy for ever; it also visits each
token of the vocabulary, which takes seconds. Long arrays are skipped here, and read only when asked for.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_STRING_NBYTES = 1 << 24
MAX_KEPT_VALUES = 4096
DEFAULT_ALIGNMENT = 32
SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class GGUFTensor:
    """`shape` in row-major order (GGUF writes it reversed); `offset` in bytes from the start of the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row, a row being the last dimension."""
        block, block_nbytes = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * block_nbytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_nbytes


@dataclass(frozen=True)
class GGUFArray:
    """Where an array of the metadata lies that was skipped: `nbytes` from `offset`."""

    item: GGUFValueType
    count: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """`metadata`: scalars, strings and short arrays of numbers; `arrays`: those that are long or hold strings."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    arrays: Mapping[str, GGUFArray]

    @classmethod
    def read(cls, path: Path) -> GGUFHeader:
        """Raises FileNotFoundError, or ValueError for a file that is not a whole, sound GGUF file."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give a GGUF file")
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError(f"{path}: not a GGUF file (it does not start with 'GGUF'); download it again")
            return _Parser(path, file).parse()

    def read_array(self, path: Path, key: str) -> list[Any] | None:
        """The array under `key`, long or short; None if there is none. ValueError for text that is not UTF-8."""
        array = self.arrays.get(key)
        if array is None:
            value = self.metadata.get(key)
            return value if isinstance(value, list) else None
        with path.open("rb") as file:
            file.seek(array.offset)
            data = file.read(array.nbytes)
        if array.item != GGUFValueType.STRING:
            code = SCALARS[array.item]
            return list(struct.unpack(f"<{array.count}{code[1]}", data))
        strings: list[str] = []
        position = 0
        for _ in range(array.count):
            start = position + 8
            position = start + int.from_bytes(data[position:start], "little")
            try:
                strings.append(data[start:position].decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: {key}[{len(strings)}] is not UTF-8 text; download the file again") from error
        return strings


class _Parser:
    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self.path = path
        self.file = file
        self.file_nbytes = path.stat().st_size

    def parse(self) -> GGUFHeader:
        version = self.number("<I")
        if version not in VERSIONS:
            raise ValueError(f"{self.path}: GGUF version {version}; supported: {VERSIONS}, little-endian")
        tensor_count, value_count = self.number("<Q"), self.number("<Q")
        metadata: dict[str, Any] = {}
        arrays: dict[str, GGUFArray] = {}
        for _ in range(value_count):
            key = self.string()
            value = self.value(self.kind())
            if isinstance(value, GGUFArray):
                arrays[key] = value
            else:
                metadata[key] = value
        table: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
        for _ in range(tensor_count):
            name = self.string()
            if name in table:
                raise self.damaged(f"tensor {name} is listed twice")
            table[name] = self.tensor_entry(name)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise self.damaged(f"general.alignment is {alignment!r}")
        start = -(-self.file.tell() // alignment) * alignment
        tensors = {name: GGUFTensor(kind, shape, start + offset) for name, (kind, shape, offset) in table.items()}
        for name, tensor in tensors.items():
            if tensor.offset + tensor.nbytes > self.file_nbytes:
                raise self.damaged(
                    f"tensor {name} ends at byte {tensor.offset + tensor.nbytes} of a file of {self.file_nbytes}"
                )
        return GGUFHeader(metadata, tensors, arrays)

    def tensor_entry(self, name: str) -> tuple[GGMLQuantizationType, tuple[int, ...], int]:
        dims = self.number("<I")
        if not 1 <= dims <= MAX_DIMS:
            raise self.damaged(f"tensor {name} has {dims} dimensions")
        shape = tuple(reversed([self.number("<Q") for _ in range(dims)]))
        code, offset = self.number("<I"), self.number("<Q")
        try:
            kind = GGMLQuantizationType(code)
        except ValueError as error:
            raise ValueError(
                f"{self.path}: tensor {name} has the unknown type {code}; update the gguf package"
            ) from error
        if 0 in shape or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise self.damaged(f"tensor {name} of type {kind.name} has shape {shape}")
        return kind, shape, offset

    def value(self, kind: GGUFValueType) -> Any:
        """A metadata value, or the place of an array that was skipped."""
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.number(SCALARS[kind])
        item, count = self.kind(), self.number("<Q")
        if item == GGUFValueType.ARRAY:
            raise self.damaged("an array of arrays in its metadata")
        start = self.file.tell()
        if item == GGUFValueType.STRING:
            for _ in range(count):
                self.skip(self.number("<Q"))
        else:
            code = SCALARS[item]
            if count <= MAX_KEPT_VALUES:
                return [self.number(code) for _ in range(count)]
            self.skip(count * struct.calcsize(code))
        return GGUFArray(item, count, start, self.file.tell() - start)

    def kind(self) -> GGUFValueType:
        code = self.number("<I")
        try:
            return GGUFValueType(code)
        except ValueError as error:
            raise self.damaged(f"metadata type {code}") from error

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        nbytes = self.number("<Q")
        if nbytes > MAX_STRING_NBYTES:
            raise self.damaged(f"a string of {nbytes} bytes")
        try:
            return self.take(nbytes).decode()
        except UnicodeDecodeError as error:
            raise self.damaged("a string that is not UTF-8") from error

    def take(self, nbytes: int) -> bytes:
        data = self.file.read(nbytes)
        if len(data) != nbytes:
            raise self.damaged("it ends inside its header")
        return data

    def skip(self, nbytes: int) -> None:
        if self.file.tell() + nbytes > self.file_nbytes:
            raise self.damaged("it ends inside its header")
        self.file.seek(nbytes, io.SEEK_CUR)

    def damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: damaged or truncated GGUF file: {what}; download it again")
