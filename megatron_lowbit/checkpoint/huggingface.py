"""HuggingFaceCheckpoint: a folder with config.json and safetensors weights, in one file or sharded with an index."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.checkpoint.reader import check_span, shown
from megatron_lowbit.checkpoint.safetensors_file import SafetensorsFile
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.registry import config_from_hf

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# buffers that old versions of transformers saved among the weights; they follow from the config
NOT_WEIGHTS = ("rotary_emb.inv_freq",)
TIED_HEAD = "lm_head.weight"


class HuggingFaceCheckpoint:
    """Reads a Hugging Face folder. Opening checks the index and every file's header, not the weights' values.

    Raises FileNotFoundError or ValueError naming the file at fault. Weight files may be symbolic links (the Hugging
    Face cache keeps them so); names in the index must be plain file names.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = _read_config(directory)
        self._files = _locate_tensors(directory)
        self._names = {name for name in self._files if not self._is_ignored(name)}

    def names(self) -> set[str]:
        return set(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._file(name).tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        return self._file(name).read(name)

    def read_span(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        check_span(name, self.shape(name), dim, start, stop)
        return self._file(name).read_span(name, dim, start, stop)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._names:
            raise ValueError(f"{self.directory}: there is no tensor {name}; there are: {shown(self._names)}")
        return self._files[name]

    def _is_ignored(self, name: str) -> bool:
        return name.endswith(NOT_WEIGHTS) or (name == TIED_HEAD and self.config.tie_embeddings)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError naming the file for anything else."""
    try:
        data = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download the file again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}; download the file again")
    return data


def _read_config(directory: Path) -> ModelConfig:
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a Hugging Face checkpoint keeps its shapes in config.json")
    data = read_json_object(path)
    quantisation = data.get("quantization_config")
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise ValueError(
            f"{path}: the weights are quantised ({method!r}); use the unquantised checkpoint (bf16 or fp32)"
        )
    config = config_from_hf(data, str(path))
    generation = directory / "generation_config.json"
    more = read_json_object(generation).get("eos_token_id") if generation.is_file() else None
    eos = more if isinstance(more, list) else [] if more is None else [more]
    if not all(type(token) is int for token in eos):
        raise ValueError(f"{generation}: eos_token_id is {more!r}, expected whole numbers; download the file again")
    return replace(config, eos_token_ids=tuple(sorted({*config.eos_token_ids, *eos})))


def _locate_tensors(directory: Path) -> dict[str, SafetensorsFile]:
    """The file that holds each tensor."""
    if (directory / SINGLE_FILE).is_file():
        file = SafetensorsFile(directory / SINGLE_FILE)
        return dict.fromkeys(file.tensors, file)
    if (directory / INDEX_FILE).is_file():
        return _read_index(directory / INDEX_FILE)
    pickled = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
    if pickled:
        raise ValueError(
            f"{directory}: only pickled weights ({pickled[0]}), which could run code when opened; get the safetensors "
            "files of the model, or write them once with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained('NEW_FOLDER')"
        )
    raise FileNotFoundError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE}; download the weights of the model")


def _read_index(path: Path) -> dict[str, SafetensorsFile]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: expected a 'weight_map' from tensors to files; download the file again")
    files: dict[str, SafetensorsFile] = {}
    for name in weight_map.values():
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            raise ValueError(
                f"{path}: {name!r} is not a plain .safetensors file name inside the folder; do not use this checkpoint"
            )
        if name not in files:
            files[name] = SafetensorsFile(path.parent / name)
    located = {tensor: files[name] for tensor, name in weight_map.items()}
    for tensor, file in located.items():
        if tensor not in file.tensors:
            raise ValueError(
                f"{path}: tensor {tensor} is not in {file.path.name}; download that file and the index again"
            )
    for file in files.values():
        for tensor in file.tensors:
            located.setdefault(tensor, file)
    return located


def is_plain_name(name: object) -> bool:
    """Whether `name` names a file directly inside a folder: no separators, no `..`, nothing absolute."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0:")
