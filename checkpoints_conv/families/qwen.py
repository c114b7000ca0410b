"""Qwen2, Qwen2.5, Qwen3 and Qwen3's mixture of experts in GGUF files. Rows are in order, unlike Llama's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints_conv.families.table import ATTENTION, EXPERTS, FEED_FORWARD, QK_NORMS, GGUFFamily
from checkpoints_conv.gguf_settings import GGUFSettings

NORM = {"post_attention_layernorm": "ffn_norm"}


def dense_settings(found: GGUFSettings, hf: Mapping[str, Any]) -> dict[str, Any]:
    """No file of these architectures has a window: their models are published with it switched off."""
    return {"use_sliding_window": False}


def moe_settings(found: GGUFSettings, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of the chosen experts sum to 1 in every Qwen3 model; files that say so say the same."""
    return {
        "use_sliding_window": False,
        "num_experts": found.integer("expert_count"),
        "num_experts_per_tok": found.integer("expert_used_count"),
        "moe_intermediate_size": found.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


QWEN2 = GGUFFamily("qwen2", "qwen2", {**ATTENTION, **NORM, **FEED_FORWARD}, settings=dense_settings)
QWEN3 = GGUFFamily(
    "qwen3",
    "qwen3",
    {**ATTENTION, **QK_NORMS, **NORM, **FEED_FORWARD},
    bias_flags={"attention_bias": "attn_q.bias"},
    settings=dense_settings,
)
QWEN3_MOE = GGUFFamily(
    "qwen3moe",
    "qwen3_moe",
    {**ATTENTION, **QK_NORMS, **NORM, **EXPERTS},
    bias_flags={"attention_bias": "attn_q.bias"},
    settings=moe_settings,
)
