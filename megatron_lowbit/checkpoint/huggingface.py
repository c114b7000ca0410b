"""HuggingFaceCheckpoint: a folder with config.json and weights, safetensors or PyTorch's, in one file or several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.checkpoint.json_file import read_json_object
from megatron_lowbit.checkpoint.model_config_file import MAX_EXPERTS, MAX_LAYERS
from megatron_lowbit.checkpoint.mxfp4 import with_mxfp4_dequantised
from megatron_lowbit.checkpoint.reader import check_span, shown
from megatron_lowbit.checkpoint.stored_view import ReadableFile, StoredView
from megatron_lowbit.checkpoint.weight_files import locate_tensors
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.registry import config_from_hf, stored_parts

CONFIG_FILE = "config.json"
# buffers that old versions of transformers saved among the weights; they follow from the config
NOT_WEIGHTS = ("rotary_emb.inv_freq",)
TIED_HEAD = "lm_head.weight"
# what a model that also sees puts before the names of its language model, and what is not part of that
WRAPPED = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
NOT_LANGUAGE = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
TEXT_CONFIG = "text_config"
LARGE_COUNTS = {
    "num_hidden_layers": MAX_LAYERS,
    "num_local_experts": MAX_EXPERTS,
    "num_experts": MAX_EXPERTS,
}


class HuggingFaceCheckpoint:
    """Reads a Hugging Face folder. Opening checks the index and every file's header, not the weights' values.

    hf_config: config.json as it stands there. left_out: tensors of other parts of the model than the language model.
    Raises FileNotFoundError or ValueError naming the file at fault. Weight files may be symbolic links (the Hugging
    Face cache keeps them so); names in the index must be plain file names.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hf_config, self.config = _read_config(directory)
        located: Mapping[str, ReadableFile] = locate_tensors(directory)
        if _quantisation(self.hf_config) == "mxfp4":
            located = with_mxfp4_dequantised(located)
        files = {name: file for name, file in located.items() if not self._is_ignored(name)}
        self.left_out: tuple[str, ...] = ()
        if TEXT_CONFIG in self.hf_config:
            self.left_out = tuple(sorted(name for name in files if name.startswith(NOT_LANGUAGE)))
            files = _unwrapped(directory, {name: files[name] for name in files if name not in set(self.left_out)})
            files = {name: file for name, file in files.items() if not self._is_ignored(name)}
        if self.config.num_layers > len(files):
            raise ValueError(
                f"{directory}: {self.config.num_layers} layers in its config.json but {len(files)} tensors; use the "
                "config that belongs to these weights"
            )
        self._view = StoredView(directory, files, stored_parts(self.config))

    def names(self) -> set[str]:
        return self._view.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checked(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._checked(name).dtype(name)

    def read(self, name: str) -> torch.Tensor:
        return self._checked(name).read(name)

    def read_span(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        check_span(name, self.shape(name), dim, start, stop)
        return self._view.read_span(name, dim, start, stop)

    def _checked(self, name: str) -> StoredView:
        if name not in self._view:
            raise ValueError(f"{self.directory}: there is no tensor {name}; there are: {shown(self.names())}")
        return self._view

    def _is_ignored(self, name: str) -> bool:
        return name.endswith(NOT_WEIGHTS) or (name == TIED_HEAD and self.config.tie_embeddings)


class _Renamed:
    """A tensor of a file under another name."""

    def __init__(self, file: ReadableFile, name: str, stored: str) -> None:
        self.path = file.path
        self.tensors = {name: file.tensors[stored]}
        self._file, self._stored = file, stored

    def read(self, name: str) -> torch.Tensor:
        return self._file.read(self._stored)

    def read_span(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        return self._file.read_span(self._stored, dim, start, stop)


def _unwrapped(directory: Path, files: Mapping[str, ReadableFile]) -> dict[str, ReadableFile]:
    """The same tensors without what a wrapper puts before their names."""
    result: dict[str, ReadableFile] = {}
    for stored, file in files.items():
        before = next((prefix for prefix in WRAPPED if stored.startswith(prefix)), None)
        name = stored if before is None else WRAPPED[before] + stored.removeprefix(before)
        if name in result:
            raise ValueError(f"{directory}: {stored} and another tensor are both {name}; download the weights again")
        result[name] = file if before is None else _Renamed(file, name, stored)
    return result


def _read_config(directory: Path) -> tuple[dict[str, Any], ModelConfig]:
    """config.json as it is, and what it says."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a Hugging Face checkpoint keeps its shapes in config.json")
    data = read_json_object(path)
    method = _quantisation(data)
    if method not in (None, "mxfp4"):
        raise ValueError(
            f"{path}: the weights are quantised ({method!r}); use the unquantised checkpoint (bf16 or fp32)"
        )
    config = config_of(data, path)
    generation = directory / "generation_config.json"
    more = read_json_object(generation).get("eos_token_id") if generation.is_file() else None
    eos = more if isinstance(more, list) else [] if more is None else [more]
    if not all(type(token) is int for token in eos):
        raise ValueError(f"{generation}: eos_token_id is {more!r}, expected whole numbers; download the file again")
    return data, replace(config, eos_token_ids=tuple(sorted({*config.eos_token_ids, *eos})))


def config_of(data: dict[str, Any], path: Path) -> ModelConfig:
    """ModelConfig of a config.json that came from elsewhere; ValueError naming `path` for whatever is wrong with it."""
    inner = data.get(TEXT_CONFIG)
    for settings in (data, inner if isinstance(inner, dict) else {}):
        for key, largest in LARGE_COUNTS.items():
            count = settings.get(key)
            if isinstance(count, (int, float)) and not 0 <= count <= largest:
                raise ValueError(f"{path}: {key} is {count}, at most {largest} make sense; download the file again")
    try:
        return config_from_hf(data, str(path))
    except (TypeError, LookupError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: a setting has the wrong type or is missing ({error}); download it again") from error


def _quantisation(data: dict[str, Any]) -> str | None:
    """What the weights are quantised with, None where they are not."""
    settings = data.get("quantization_config")
    if settings is None:
        return None
    return str(settings.get("quant_method")) if isinstance(settings, dict) else str(settings)
