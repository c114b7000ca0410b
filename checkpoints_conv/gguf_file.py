"""GGUFFile: the tensors of a GGUF file, named, ordered and offset as Hugging Face has them, dequantised to FP32."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from gguf.quants import dequantize

from checkpoints_conv.families.table import GGUFFamily
from checkpoints_conv.gguf_header import GGUFHeader, GGUFTensor
from megatron_lowbit.checkpoint.reader import check_span
from megatron_lowbit.checkpoint.tensor_file import StoredTensor


class GGUFFile:
    """heads: how many heads the modules have whose rows the file interleaves. `ignored` tensors are not listed.

    Norms come back as `stored - offset`, subtracted in FP32. Gemma's files store 1 + w, which rounds a bf16 w only
    where it is below 2^-16; so w is what was published, and rounding *it* to bf16 loses nothing, while 1 + w in bf16
    would lose all of w but its leading bits.
    """

    def __init__(
        self, path: Path, header: GGUFHeader, family: GGUFFamily, heads: Mapping[str, int], ignored: Collection[str]
    ) -> None:
        self.path = path
        self._offset = family.norm_offset
        self._heads = heads
        self._stored: dict[str, GGUFTensor] = {
            canonical_name(family, name): tensor for name, tensor in header.tensors.items() if name not in ignored
        }
        self.tensors = {
            name: StoredTensor(torch.float32, tensor.shape, tensor.offset) for name, tensor in self._stored.items()
        }

    def read(self, name: str) -> torch.Tensor:
        return self.read_span(name, 0, 0, self._stored[name].shape[0])

    def read_span(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """`full.narrow(dim, start, stop - start)`; whole rows are read whatever the dimension."""
        tensor = self._stored[name]
        shape = check_span(name, tensor.shape, dim, start, stop)
        if 0 in shape:
            return torch.empty(shape)
        first, last = (start, stop) if dim == 0 else (0, shape[0])
        heads = next((count for module, count in self._heads.items() if f".{module}." in name), None)
        if heads is not None:
            rows = self._deinterleaved(name, tensor, heads, first, last)
        else:
            rows = read_rows(self.path, tensor, first, last)
        if self._offset and name.endswith("norm.weight"):
            rows = rows - self._offset
        return rows.narrow(dim, start, stop - start).contiguous() if dim > 0 else rows

    def _deinterleaved(self, name: str, tensor: GGUFTensor, heads: int, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) in canonical order. GGUF puts row j of a head's second half right behind row j of its
        first half, so that rotary pairs are neighbours; whole heads are read and put back in order."""
        if tensor.shape[0] % (2 * heads):
            raise ValueError(
                f"{self.path}: tensor {name} has {tensor.shape[0]} rows, expected {heads} heads of even width"
            )
        width = tensor.shape[0] // heads
        first_head, last_head = first // width, -(-last // width)
        rows = read_rows(self.path, tensor, first_head * width, last_head * width)
        paired = rows.reshape(last_head - first_head, width // 2, 2, *rows.shape[1:])
        ordered = paired.transpose(1, 2).reshape(rows.shape)
        return ordered[first - first_head * width : last - first_head * width]


def read_rows(path: Path, tensor: GGUFTensor, first: int, last: int) -> torch.Tensor:
    """`[first, last)` along dimension 0 of a tensor as it is stored, fp32; of a vector all is read."""
    if len(tensor.shape) == 1:
        return _lines(path, tensor, 0, 1).flatten()[first:last]
    lines = math.prod(tensor.shape[1:-1])
    return _lines(path, tensor, first * lines, last * lines).reshape(last - first, *tensor.shape[1:])


def _lines(path: Path, tensor: GGUFTensor, first: int, last: int) -> torch.Tensor:
    """`[last - first, line length]` fp32, a line being the last dimension: what is quantised together."""
    with path.open("rb") as file:
        file.seek(tensor.offset + first * tensor.row_nbytes)
        data = bytearray(file.read((last - first) * tensor.row_nbytes))
    if len(data) != (last - first) * tensor.row_nbytes:
        raise ValueError(f"{path}: the file became shorter while it was read; is it still being written?")
    stored = np.frombuffer(data, dtype=np.uint8).reshape(last - first, tensor.row_nbytes)
    return torch.from_numpy(dequantize(stored, tensor.kind))


def canonical_name(family: GGUFFamily, stored: str) -> str:
    """Canonical name of a GGUF tensor; a tensor the family does not know keeps its name, for the strict check."""
    layer = re.fullmatch(r"blk\.(\d+)\.(.+)\.(weight|bias)", stored)
    if layer is not None:
        index, module, part = layer.groups()
        for canonical, name in family.layer_modules.items():
            if name == module:
                return f"model.layers.{index}.{canonical}" + ("" if canonical in family.bare else f".{part}")
    for canonical, name in family.modules.items():
        if stored.rpartition(".")[0] == name:
            return f"{canonical}.{stored.rpartition('.')[2]}"
    return stored
