"""A ModelConfig from a config.json alone: Hugging Face's of a supported family, or a converted checkpoint's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lowbit.checkpoint.huggingface import config_of
from megatron_lowbit.checkpoint.json_file import read_json_object
from megatron_lowbit.config import ModelConfig

CONFIG_FILE = "config.json"


def config_path(path: Path) -> Path:
    """`path` itself, or the config.json of a folder; FileNotFoundError where there is none."""
    found = path / CONFIG_FILE if path.is_dir() else path
    if not found.is_file():
        raise FileNotFoundError(f"{found}: no such file; give a Hugging Face config.json or the folder that holds one")
    return found


def is_converted(data: dict[str, Any]) -> bool:
    """Whether a config.json is one that `megatron-lowbit convert` wrote."""
    return "family" in data and "num_layers" in data


def read_config(path: Path) -> ModelConfig:
    """Shapes of a model this program can run; ValueError naming the file for anything else."""
    path = config_path(path)
    data = read_json_object(path)
    return ModelConfig.from_json(path.read_text(), str(path)) if is_converted(data) else config_of(data, path)
