"""Qwen 3 mixtures of experts (30B-A3B, 235B-A22B): many narrow experts, normed queries and keys."""

from __future__ import annotations

from typing import Any

from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.experts import experts_from_hf
from megatron_lowbit.models.hf_config import (
    activation,
    integer,
    model_config,
    refuse_unsupported,
    sliding_windows,
    with_defaults,
)
from megatron_lowbit.models.table import decoder_tensors, stored_under_own_names

MODEL_TYPES: tuple[str, ...] = ("qwen3_moe",)

tensor_sources = decoder_tensors
stored_parts = stored_under_own_names


def config_from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """Reads a Hugging Face `config.json` of this family; `where` names the file in errors. Raises ValueError."""
    hf = with_defaults(
        hf, intermediate_size=6144, moe_intermediate_size=768, num_experts_per_tok=8, num_key_value_heads=4,
        max_position_embeddings=32768, sliding_window=4096,
    )  # fmt: skip
    if hf.get("num_local_experts") is None:
        hf = with_defaults(hf, num_experts=128)
    refuse_unsupported(hf, where)
    layers = integer(hf, "num_hidden_layers", where)
    # all layers, as transformers has it; it does not read the max_window_layers that the files also have
    window = hf["sliding_window"] if hf.get("use_sliding_window") else None
    dense = _dense_layers(hf, where, layers)
    bias = bool(hf.get("attention_bias", False))
    moe = experts_from_hf(
        hf, where, "moe_intermediate_size", renormalize=bool(hf.get("norm_topk_prob", False)), dense_layers=dense
    )
    return model_config(
        hf,
        where,
        "qwen3_moe",
        activation=activation(hf, where),
        qk_norm=True,
        attention_bias=bias,
        attention_output_bias=bias,
        moe=moe,
        **sliding_windows(hf, where, window, default=(window is not None,) * layers),
    )


def _dense_layers(hf: dict[str, Any], where: str, layers: int) -> tuple[int, ...]:
    """`mlp_only_layers`, and all but every `decoder_sparse_step`-th layer."""
    listed, step = hf.get("mlp_only_layers") or [], integer(hf, "decoder_sparse_step", where, 1)
    if step < 1:
        raise ValueError(f"{where}: decoder_sparse_step is {step}, it must be at least 1 (every layer has experts)")
    return tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step)
