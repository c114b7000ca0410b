"""Qwen 2, 2.5 and 3, dense: biases of query, key and value in the older ones, normed queries and keys in the newer."""

from __future__ import annotations

from typing import Any

from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.hf_config import (
    activation,
    integer,
    model_config,
    refuse_unsupported,
    sliding_windows,
    with_defaults,
)
from megatron_lowbit.models.table import decoder_tensors, stored_under_own_names

MODEL_TYPES: tuple[str, ...] = ("qwen2", "qwen3")

tensor_sources = decoder_tensors
stored_parts = stored_under_own_names


def config_from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """Reads a Hugging Face `config.json` of this family; `where` names the file in errors. Raises ValueError."""
    hf = with_defaults(hf, max_position_embeddings=32768, num_key_value_heads=32)
    if hf["model_type"] == "qwen3":
        hf = with_defaults(hf, head_dim=128)
        bias = bool(hf.get("attention_bias", False))
        own: dict[str, Any] = dict(qk_norm=True, attention_bias=bias, attention_output_bias=bias)
    else:
        own = dict(attention_bias=True)
    refuse_unsupported(hf, where)
    return model_config(hf, where, hf["model_type"], activation=activation(hf, where), **qwen_windows(hf, where), **own)


def qwen_windows(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """Off unless `use_sliding_window`, and then for the layers from `max_window_layers` on."""
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    layers = integer(hf, "num_hidden_layers", where)
    first = integer(hf, "max_window_layers", where, 28) if window is not None else layers
    return sliding_windows(hf, where, window, default=tuple(layer >= first for layer in range(layers)))
