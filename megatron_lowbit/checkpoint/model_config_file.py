"""config.json of a converted checkpoint, read as strictly as it was written: types, and numbers that make sense."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_lowbit.checkpoint.json_file import read_json_object
from megatron_lowbit.config import ModelConfig, MoEConfig, RopeScaling

# far beyond any model; a number beyond it would only keep the program busy
MAX_LAYERS, MAX_EXPERTS = 10_000, 10_000
NESTED: dict[str, type] = {"RopeScaling": RopeScaling, "MoEConfig": MoEConfig}
PLAIN: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def read_model_config(path: Path) -> ModelConfig:
    """The config that `ModelConfig.to_json` wrote; ValueError naming the file for anything else."""
    data = read_json_object(path)
    for field in fields(ModelConfig):
        if field.name in data and not _fits(data[field.name], str(field.type)):
            raise ValueError(
                f"{path}: {field.name} is {str(data[field.name])[:80]}, expected {field.type}; convert the checkpoint "
                "again"
            )
    experts = (data.get("moe") or {}).get("num_experts", 0)
    if data.get("num_layers", 0) > MAX_LAYERS or experts > MAX_EXPERTS:
        raise ValueError(
            f"{path}: {data.get('num_layers')} layers and {experts} experts; at most {MAX_LAYERS} and {MAX_EXPERTS} "
            "make sense, convert the checkpoint again"
        )
    return ModelConfig.from_json(path.read_text(), str(path))


def _fits(value: Any, kind: str) -> bool:
    """Whether a JSON value is what a field annotated with `kind` holds."""
    if kind.endswith(" | None"):
        return value is None or _fits(value, kind.removesuffix(" | None"))
    if kind.startswith("tuple["):
        inner = kind.removeprefix("tuple[").removesuffix(", ...]")
        return isinstance(value, list) and all(_fits(item, inner) for item in value)
    if kind in NESTED:
        annotations = {field.name: str(field.type) for field in fields(NESTED[kind])}
        return (
            isinstance(value, dict)
            and set(value) <= set(annotations)
            and all(_fits(item, annotations[name]) for name, item in value.items())
        )
    return type(value) in PLAIN[kind] and (not isinstance(value, float) or math.isfinite(value))
