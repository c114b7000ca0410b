"""Mistral: 7B, whose first version sees a window in every layer, NeMo with heads narrower than usual, and others."""

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

MODEL_TYPES: tuple[str, ...] = ("mistral",)

tensor_sources = decoder_tensors
stored_parts = stored_under_own_names


def config_from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """Reads a Hugging Face `config.json` of this family; `where` names the file in errors. Raises ValueError."""
    hf = with_defaults(
        hf, sliding_window=4096, max_position_embeddings=131072, num_key_value_heads=8, bos_token_id=1, eos_token_id=2
    )
    refuse_unsupported(hf, where)
    window = hf["sliding_window"]
    layers = integer(hf, "num_hidden_layers", where)
    return model_config(
        hf,
        where,
        "mistral",
        activation=activation(hf, where),
        **sliding_windows(hf, where, window, default=(window is not None,) * layers),
    )
