"""Mixtral 8x7B and 8x22B: Mistral's attention, and eight experts in place of the feed-forward block."""

from __future__ import annotations

from typing import Any

from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.experts import experts_from_hf, moe_layers
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

MODEL_TYPES: tuple[str, ...] = ("mixtral",)

STORED_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

tensor_sources = decoder_tensors


def config_from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """Reads a Hugging Face `config.json` of this family; `where` names the file in errors. Raises ValueError."""
    hf = with_defaults(
        hf, num_local_experts=8, num_experts_per_tok=2, num_key_value_heads=8, max_position_embeddings=131072,
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    refuse_unsupported(hf, where)
    window = hf.get("sliding_window")
    layers = integer(hf, "num_hidden_layers", where)
    return model_config(
        hf,
        where,
        "mixtral",
        rope=read_rope(hf, where, theta=1e6),
        activation=activation(hf, where),
        moe=experts_from_hf(hf, where, "intermediate_size"),
        **sliding_windows(hf, where, window, default=(window is not None,) * layers),
    )


def stored_parts(config: ModelConfig) -> dict[str, StoredPart]:
    """The block of experts and their projections have names of their own; no tensor is merged."""
    moe, hidden = config.moe, config.hidden_size
    assert moe is not None
    shapes = dict.fromkeys(STORED_NAMES, (moe.intermediate_size, hidden)) | {
        "down_proj": (hidden, moe.intermediate_size)
    }
    parts = {}
    for layer, prefix in moe_layers(config):
        stored = f"model.layers.{layer}.block_sparse_moe."
        parts[prefix + "gate.weight"] = StoredPart(stored + "gate.weight", (moe.num_experts, hidden))
        for expert in range(moe.num_experts):
            for name, theirs in STORED_NAMES.items():
                parts[f"{prefix}experts.{expert}.{name}.weight"] = StoredPart(
                    f"{stored}experts.{expert}.{theirs}.weight", shapes[name]
                )
    return parts
