"""Phi-3, Phi-3.5 and Phi-4: query, key and value in one stored tensor, gate and up in another; heads rotated in part,
and a frequency divisor of its own for every feature in the models of long context."""

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
from megatron_lowbit.models.hf_rope import read_rope
from megatron_lowbit.models.table import decoder_tensors
from megatron_lowbit.stored import StoredPart

MODEL_TYPES: tuple[str, ...] = ("phi3",)

#: Earlier names of the same thing.
LONGROPE_NAMES = {"su": "longrope", "yarn": "longrope"}

tensor_sources = decoder_tensors


def config_from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """Reads a Hugging Face `config.json` of this family; `where` names the file in errors. Raises ValueError."""
    hf = with_defaults(
        hf, max_position_embeddings=4096, original_max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=1,
        eos_token_id=32000,
    )  # fmt: skip
    refuse_unsupported(hf, where)
    window = hf.get("sliding_window")
    layers = integer(hf, "num_hidden_layers", where)
    return model_config(
        hf,
        where,
        "phi3",
        rope=read_rope(hf, where, aliases=LONGROPE_NAMES),
        activation=activation(hf, where),
        **sliding_windows(hf, where, window, default=(window is not None,) * layers),
    )


def stored_parts(config: ModelConfig) -> dict[str, StoredPart]:
    """`qkv_proj` holds the rows of query, key and value, `gate_up_proj` those of gate and up."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = {}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for merged, pieces in (
            ("self_attn.qkv_proj", {"q_proj": queries, "k_proj": keys, "v_proj": keys}),
            ("mlp.gate_up_proj", {"gate_proj": ffn, "up_proj": ffn}),
        ):
            shape, start = (sum(pieces.values()), hidden), 0
            folder = prefix + merged.partition(".")[0]
            for name, rows in pieces.items():
                stored = StoredPart(f"{prefix}{merged}.weight", shape, start=start, stop=start + rows)
                parts[f"{folder}.{name}.weight"] = stored
                start += rows
    return parts
