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
from checkpoints_conv.gguf_file import GGUFFile, read_rows
from checkpoints_conv.gguf_header import GGUFHeader
from checkpoints_conv.gguf_rope import ROPE_TENSORS
from megatron_lowbit.checkpoint.reader import shown
from megatron_lowbit.checkpoint.stored_view import StoredView
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.registry import stored_parts, tensor_sources
from megatron_lowbit.stored import StoredPart

EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(.+)")


class GGUFCheckpoint:
    """Reads one GGUF file; `directory` is the folder it lies in. Meant for conversion, not for serving.

    Raises FileNotFoundError, or ValueError for a damaged file, an unsupported architecture or tensor type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.directory = path.parent
        header = GGUFHeader.read(path)
        _check_types(path, header)
        family = _family_of(path, header)
        rope = {name: header.tensors[name] for name in ROPE_TENSORS if name in header.tensors}
        self.config: ModelConfig = read_config(
            path, header, family, {name: read_rows(path, tensor, 0, tensor.shape[0]) for name, tensor in rope.items()}
        )
        heads = {module: int(getattr(self.config, field)) for module, field in family.interleaved_heads.items()}
        self._file = GGUFFile(path, header, family, heads, ROPE_TENSORS)
        self._view = StoredView(path, dict.fromkeys(self._file.tensors, self._file), self._parts())

    def names(self) -> set[str]:
        return self._view.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._view.shape(self._checked(name))

    def dtype(self, name: str) -> torch.dtype:
        self._checked(name)
        return torch.float32

    def read(self, name: str) -> torch.Tensor:
        return self._view.read(self._checked(name))

    def read_span(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        return self._view.read_span(self._checked(name), dim, start, stop)

    def _checked(self, name: str) -> str:
        if name not in self._view:
            raise ValueError(f"{self.path}: there is no tensor {name}; there are: {shown(self._view.names())}")
        return name

    def _parts(self) -> dict[str, StoredPart]:
        """Canonical tensors that the file keeps inside others: each expert inside the tensor of all, whatever their
        Hugging Face checkpoints do, and merged projections where those merge them."""
        moe = self.config.moe
        if moe is None:
            return stored_parts(self.config)
        parts = {}
        for name, source in tensor_sources(self.config).items():
            expert = EXPERT.fullmatch(name)
            if expert is not None:
                start, index, module = expert.groups()
                parts[name] = StoredPart(start + module, (moe.num_experts, *source.shape), index=int(index))
        return parts


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
