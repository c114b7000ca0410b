"""GGUFCheckpoint: the tensors of a GGUF file under their canonical names, dequantised to FP32."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from checkpoints_conv.families import FAMILIES
from checkpoints_conv.families.table import GGUFFamily
from checkpoints_conv.gguf_config import read_config
from checkpoints_conv.gguf_header import GGUFHeader, GGUFTensor
from megatron_lowbit.checkpoint.reader import check_span, shown
from megatron_lowbit.config import ModelConfig

ROPE_DIVISORS = "rope_freqs.weight"


class GGUFCheckpoint:
    """Reads one GGUF file; `directory` is the folder it lies in. Meant for conversion, not for serving.

    Raises FileNotFoundError, or ValueError for a damaged file, an unsupported architecture or tensor type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.directory = path.parent
        self._header = GGUFHeader.read(path)
        _check_types(path, self._header)
        self._family = _family_of(path, self._header)
        divisors = self._header.tensors.get(ROPE_DIVISORS)
        self.config: ModelConfig = read_config(
            path, self._header, self._family, None if divisors is None else self._rows(divisors, 0, 1).flatten()
        )
        self._stored_names = {
            canonical_name(self._family, name): name for name in self._header.tensors if name != ROPE_DIVISORS
        }

    def names(self) -> set[str]:
        return set(self._stored_names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        self._tensor(name)
        return torch.float32

    def read(self, name: str) -> torch.Tensor:
        return self.read_span(name, 0, 0, self.shape(name)[0])

    def read_span(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        tensor = self._tensor(name)
        shape = check_span(name, tensor.shape, dim, start, stop)
        if 0 in shape:
            return torch.empty(shape)
        if len(shape) > 2:
            raise ValueError(f"{self.path}: tensor {name} has shape {tensor.shape}; expected one or two dimensions")
        first, last = (start, stop) if dim == 0 else (0, shape[0])
        heads = self._interleaved_heads(name)
        if heads is not None:
            rows = self._deinterleaved(name, tensor, heads, first, last)
        elif len(shape) == 1:
            rows = self._rows(tensor, 0, 1).flatten()[first:last]
        else:
            rows = self._rows(tensor, first, last)
        return rows.narrow(1, start, stop - start).contiguous() if dim == 1 else rows

    def _tensor(self, name: str) -> GGUFTensor:
        if name not in self._stored_names:
            raise ValueError(f"{self.path}: there is no tensor {name}; there are: {shown(self._stored_names)}")
        return self._header.tensors[self._stored_names[name]]

    def _interleaved_heads(self, name: str) -> int | None:
        """Number of heads whose rows GGUF reorders in this tensor, None where rows are in order."""
        for module, field in self._family.interleaved_heads.items():
            if f".{module}." in name:
                return int(getattr(self.config, field))
        return None

    def _deinterleaved(self, name: str, tensor: GGUFTensor, heads: int, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) in canonical order. GGUF puts row j of a head's second half right behind row j of its
        first half, so that rotary pairs are neighbours; whole heads are read and put back in order."""
        if tensor.shape[0] % (2 * heads):
            raise ValueError(
                f"{self.path}: tensor {name} has {tensor.shape[0]} rows, expected {heads} heads of even width"
            )
        width = tensor.shape[0] // heads
        first_head, last_head = first // width, -(-last // width)
        if len(tensor.shape) == 1:
            rows = self._rows(tensor, 0, 1).flatten()[first_head * width : last_head * width]
        else:
            rows = self._rows(tensor, first_head * width, last_head * width)
        paired = rows.reshape(last_head - first_head, width // 2, 2, *rows.shape[1:])
        ordered = paired.transpose(1, 2).reshape(rows.shape)
        return ordered[first - first_head * width : last - first_head * width]

    def _rows(self, tensor: GGUFTensor, first: int, last: int) -> torch.Tensor:
        """`[last - first, row length]` fp32; a vector is one row."""
        with self.path.open("rb") as file:
            file.seek(tensor.offset + first * tensor.row_nbytes)
            data = bytearray(file.read((last - first) * tensor.row_nbytes))
        if len(data) != (last - first) * tensor.row_nbytes:
            raise ValueError(f"{self.path}: the file became shorter while it was read; is it still being written?")
        stored = np.frombuffer(data, dtype=np.uint8).reshape(last - first, tensor.row_nbytes)
        return torch.from_numpy(dequantize(stored, tensor.kind))


def canonical_name(family: GGUFFamily, stored: str) -> str:
    """Canonical name of a GGUF tensor; a tensor the family does not know keeps its name, for the strict check."""
    layer = re.fullmatch(r"blk\.(\d+)\.(.+)\.(weight|bias)", stored)
    if layer is not None:
        index, module, part = layer.groups()
        for canonical, name in family.layer_modules.items():
            if name == module:
                return f"model.layers.{index}.{canonical}.{part}"
    for canonical, name in family.modules.items():
        if stored.rpartition(".")[0] == name:
            return f"{canonical}.{stored.rpartition('.')[2]}"
    return stored


def _family_of(path: Path, header: GGUFHeader) -> GGUFFamily:
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise ValueError(f"{path}: architecture {architecture!r} is not supported; supported: {sorted(FAMILIES)}")
    return FAMILIES[architecture]


def _check_types(path: Path, header: GGUFHeader) -> None:
    """Raises ValueError unless every tensor type in the file can be dequantised, tried on one row of zeros."""
    examples = {tensor.kind: (name, tensor) for name, tensor in header.tensors.items()}
    for kind, (name, tensor) in examples.items():
        try:
            dequantize(np.zeros((1, tensor.row_nbytes), dtype=np.uint8), GGMLQuantizationType(kind))
        except NotImplementedError as error:
            raise ValueError(
                f"{path}: tensor {name} has the type {kind.name}, which the gguf package cannot dequantise; "
                "use a file with another quantisation"
            ) from error
