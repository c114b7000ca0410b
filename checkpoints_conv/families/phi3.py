"""Phi-3 and Phi-4 in GGUF files: query, key and value in one tensor, gate and up in another, as they are published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints_conv.families.table import GGUFFamily
from checkpoints_conv.gguf_settings import GGUFSettings


def settings(found: GGUFSettings, hf: Mapping[str, Any]) -> dict[str, Any]:
    """A window of 0 means none (Phi-4)."""
    window = found.integer("attention.sliding_window", 0, least=0)
    maximum = hf["max_position_embeddings"]
    return {
        "sliding_window": window if 0 < window < maximum else None,
        "original_max_position_embeddings": found.integer("rope.scaling.original_context_length", maximum),
    }


PHI3 = GGUFFamily(
    architecture="phi3",
    model_type="phi3",
    layer_modules={
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    partial_rotary=True,
    settings=settings,
)
