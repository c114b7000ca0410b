"""The Llama family in GGUF files, which Mistral and Mixtral share: names, and rows in interleaved order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints_conv.families.table import ATTENTION, EXPERTS, FEED_FORWARD, GGUFFamily
from checkpoints_conv.gguf_settings import GGUFSettings


def settings(found: GGUFSettings, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Which of the three it is: experts make it Mixtral, a sliding window Mistral.

    Converters do not write the window of Mistral 7B v0.1, so such a file reads as a Llama; the two agree within it.
    """
    experts = found.integer("expert_count", 0, least=0)
    if experts:
        return {
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": found.integer("expert_used_count"),
            "sliding_window": None,
        }
    window = found.integer("attention.sliding_window", 0, least=0)
    return {"model_type": "mistral", "sliding_window": window} if window else {}


LLAMA = GGUFFamily(
    architecture="llama",
    model_type="llama",
    layer_modules={**ATTENTION, "post_attention_layernorm": "ffn_norm", **FEED_FORWARD, **EXPERTS},
    interleaved_heads={"self_attn.q_proj": "num_heads", "self_attn.k_proj": "num_kv_heads"},
    bias_flags={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"},
    settings=settings,
)
