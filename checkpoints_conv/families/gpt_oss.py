"""gpt-oss in GGUF files: gate and up of the experts apart, and neither transposed as they are published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints_conv.families.table import ATTENTION, EXPERTS, GGUFFamily
from checkpoints_conv.gguf_settings import GGUFSettings


def settings(found: GGUFSettings, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The ramp between kept and stretched frequencies is not cut to whole features; GGUF has no key for it."""
    scaling = hf["rope_scaling"]
    return {
        "intermediate_size": found.integer("expert_feed_forward_length"),
        "num_local_experts": found.integer("expert_count"),
        "num_experts_per_tok": found.integer("expert_used_count"),
        "sliding_window": found.integer("attention.sliding_window"),
        "rope_scaling": None if scaling is None else {**scaling, "truncate": False},
    }


GPT_OSS = GGUFFamily(
    architecture="gpt-oss",
    model_type="gpt_oss",
    layer_modules={
        **ATTENTION,
        "self_attn.sinks": "attn_sinks",
        "post_attention_layernorm": "post_attention_norm",
        **EXPERTS,
    },
    bias_flags={"attention_bias": "attn_q.bias"},
    bare=("self_attn.sinks",),
    settings=settings,
)
