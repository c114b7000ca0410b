"""The table of model families: from a Hugging Face `model_type` to the module that describes it."""

from __future__ import annotations

from typing import Any, Protocol

from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models import gemma, gpt_oss, llama, mistral, mixtral, phi3, qwen, qwen3_moe
from megatron_lowbit.sharding import TensorSource
from megatron_lowbit.stored import StoredPart


class Family(Protocol):
    """What a family module provides."""

    MODEL_TYPES: tuple[str, ...]

    def config_from_hf(self, hf: dict[str, Any], where: str) -> ModelConfig: ...

    def tensor_sources(self, config: ModelConfig) -> dict[str, TensorSource]: ...

    def stored_parts(self, config: ModelConfig) -> dict[str, StoredPart]: ...


FAMILIES: dict[str, Family] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen,
    "qwen3": qwen,
    "gemma": gemma,
    "gemma2": gemma,
    "gemma3": gemma,
    "phi3": phi3,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
}


def config_from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """ModelConfig of a Hugging Face `config.json`; ValueError names the model types that are supported."""
    for family in FAMILIES.values():
        if hf.get("model_type") in family.MODEL_TYPES:
            return family.config_from_hf(hf, where)
    supported = sorted({kind for family in FAMILIES.values() for kind in family.MODEL_TYPES})
    raise ValueError(f"{where}: model_type {hf.get('model_type')!r} is not supported; supported: {supported}")


def tensor_sources(config: ModelConfig) -> dict[str, TensorSource]:
    """Every checkpoint tensor of the model by its canonical (Hugging Face) name."""
    if config.family not in FAMILIES:
        raise ValueError(f"model family {config.family!r} is unknown; known: {sorted(FAMILIES)}")
    return FAMILIES[config.family].tensor_sources(config)


def stored_parts(config: ModelConfig) -> dict[str, StoredPart]:
    """Canonical tensors that a Hugging Face checkpoint of this family keeps under another name or inside another."""
    tensor_sources(config)  # refuses a family that is unknown
    return FAMILIES[config.family].stored_parts(config)
