"""From GGUF metadata to ModelConfig, by way of the Hugging Face keys that the model families already read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints_conv.families.table import GGUFFamily
from checkpoints_conv.gguf_header import GGUFHeader
from checkpoints_conv.gguf_rope import rope_scaling
from checkpoints_conv.gguf_settings import GGUFSettings
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.registry import config_from_hf

# Hugging Face key -> GGUF key after "<architecture>."
INTEGERS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
EXPERT_TENSOR = "blk.0.ffn_gate_exps.weight"
END_TOKEN_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_config(
    path: Path, header: GGUFHeader, family: GGUFFamily, rope_tensors: Mapping[str, torch.Tensor]
) -> ModelConfig:
    """Raises ValueError where metadata is missing or asks for what is not supported; `path` names the file in it.

    rope_tensors: those of `gguf_rope.ROPE_TENSORS` that are there.
    """
    settings = GGUFSettings(path, header, family.architecture)
    hf: dict[str, Any] = {"model_type": family.model_type}
    for key, name in INTEGERS.items():
        hf[key] = settings.integer(name)
    if hf["num_hidden_layers"] > len(header.tensors):
        raise ValueError(
            f"{path}: {hf['num_hidden_layers']} layers but {len(header.tensors)} tensors; download it again"
        )
    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{path}: tensor token_embd.weight is missing; it is not the file of a whole model")
    hf["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    hf["num_key_value_heads"] = settings.integer("attention.head_count_kv", hf["num_attention_heads"])
    width = settings.integer("attention.key_length", hf["hidden_size"] // hf["num_attention_heads"])
    hf["head_dim"] = width
    if settings.integer("attention.value_length", width) != width:
        raise ValueError(f"{path}: keys and values of different widths are not supported")
    hf["rms_norm_eps"] = settings.decimal("attention.layer_norm_rms_epsilon")
    hf["rope_theta"] = settings.decimal("rope.freq_base", 10000.0)
    rotated = settings.integer("rope.dimension_count", width)
    if rotated != width and not family.partial_rotary:
        raise ValueError(
            f"{path}: rotary embeddings over {rotated} of {width} dimensions; {family.architecture} has all"
        )
    if family.partial_rotary:
        hf["partial_rotary_factor"] = rotated / width
    hf["rope_scaling"] = rope_scaling(settings, rope_tensors, hf["rope_theta"], rotated)
    hf["tie_word_embeddings"] = "output.weight" not in header.tensors
    for key, tensor in family.bias_flags.items():
        hf[key] = f"blk.0.{tensor}" in header.tensors
    hf["bos_token_id"] = header.metadata.get("tokenizer.ggml.bos_token_id")
    ends = {header.metadata.get(f"tokenizer.ggml.{key}") for key in END_TOKEN_KEYS} - {None}
    hf["eos_token_id"] = sorted(ends) or None
    hf |= family.settings(settings, hf)
    if settings.integer("attention.sliding_window", 0, least=0) and "sliding_window" not in hf:
        raise ValueError(f"{path}: a sliding window, which models of {family.architecture} do not have")
    _check_experts(path, header, family, settings, hf)
    return config_from_hf(hf, str(path))


def _check_experts(
    path: Path, header: GGUFHeader, family: GGUFFamily, settings: GGUFSettings, hf: Mapping[str, Any]
) -> None:
    """Raises ValueError unless the file has the experts that it speaks of, and its family reads them."""
    experts = settings.integer("expert_count", 0, least=0)
    if not experts:
        return
    if "num_experts_per_tok" not in hf:
        raise ValueError(f"{path}: a mixture of experts, which is not supported for {family.architecture}")
    stacked = header.tensors.get(EXPERT_TENSOR)
    if stacked is None or stacked.shape[0] != experts:
        found = "is missing" if stacked is None else f"has shape {stacked.shape}"
        raise ValueError(
            f"{path}: of {experts} experts, tensor {EXPERT_TENSOR} {found}; files that keep each expert by itself are "
            "too old: take a newer one of the same model"
        )
