"""The Llama family: Llama 1 to 3.x, SmolLM2, and checkpoints of the same layout. The plain decoder of this package."""

from __future__ import annotations

from typing import Any

from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.hf_config import activation, integer, model_config, refuse_unsupported
from megatron_lowbit.models.table import decoder_tensors, stored_under_own_names

MODEL_TYPES: tuple[str, ...] = ("llama",)

tensor_sources = decoder_tensors
stored_parts = stored_under_own_names


def config_from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """Reads a Hugging Face `config.json` of this family; `where` names the file in errors. Raises ValueError."""
    refuse_unsupported(hf, where)
    maximum = integer(hf, "max_position_embeddings", where, 2048)
    window = integer(hf, "sliding_window", where, maximum)
    if window < maximum:
        raise ValueError(
            f"{where}: sliding_window {window} is shorter than the context of {maximum} tokens, and Llama models have "
            f"no sliding window; if this is one, set max_position_embeddings to at most {window}"
        )
    bias = bool(hf.get("attention_bias", False))
    return model_config(
        hf,
        where,
        "llama",
        activation=activation(hf, where),
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
    )
