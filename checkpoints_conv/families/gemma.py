"""Gemma 1, 2 and 3 in GGUF files: norms stored as 1 + weight, and what the architecture's name implies.

Source: llama.cpp's readers of `gemma2` and `gemma3`, for the settings that the files leave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints_conv.families.table import ATTENTION, FEED_FORWARD, QK_NORMS, GGUFFamily
from checkpoints_conv.gguf_settings import GGUFSettings

POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# every n-th layer sees all tokens, the others a window
GEMMA2_PATTERN, GEMMA3_PATTERN = 2, 6
# Only the 27B models scale scores by hidden / heads instead of the width of a head; the files do not say so.
GEMMA2_27B_LAYERS, GEMMA3_27B_LAYERS = 46, 62
GEMMA3_LOCAL_THETA = 10000.0


def gemma1_settings(found: GGUFSettings, hf: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False}


def gemma2_settings(found: GGUFSettings, hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_common(found, hf, GEMMA2_27B_LAYERS),
        "sliding_window": found.integer("attention.sliding_window"),
        "layer_types": _layer_types(found, hf["num_hidden_layers"], GEMMA2_PATTERN),
        "attn_logit_softcapping": found.decimal("attn_logit_softcapping"),
        "final_logit_softcapping": found.decimal("final_logit_softcapping"),
    }


def gemma3_settings(found: GGUFSettings, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Without a window, all layers see all tokens. The rotary scaling of the file holds for those layers only."""
    window = found.integer("attention.sliding_window", 0, least=0)
    softcap = "final_logit_softcapping"
    return {
        **_common(found, hf, GEMMA3_27B_LAYERS),
        "sliding_window": window or None,
        "layer_types": _layer_types(found, hf["num_hidden_layers"], GEMMA3_PATTERN if window else 1),
        "rope_local_base_freq": found.decimal("rope.freq_base_swa", GEMMA3_LOCAL_THETA),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": found.decimal(softcap) if softcap in found else None,
    }


def _common(found: GGUFSettings, hf: Mapping[str, Any], layers_of_27b: int) -> dict[str, Any]:
    is_27b = hf["num_hidden_layers"] == layers_of_27b
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": hf["hidden_size"] // hf["num_attention_heads"] if is_27b else hf["head_dim"],
    }


def _layer_types(found: GGUFSettings, layers: int, pattern: int) -> list[str]:
    pattern = found.integer("attention.sliding_window_pattern", pattern)
    return ["full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)]


GEMMA = GGUFFamily(
    architecture="gemma",
    model_type="gemma",
    layer_modules={**ATTENTION, "post_attention_layernorm": "ffn_norm", **FEED_FORWARD},
    norm_offset=1.0,
    settings=gemma1_settings,
)
GEMMA2 = GGUFFamily(
    architecture="gemma2",
    model_type="gemma2",
    layer_modules={**ATTENTION, **POST_NORMS, **FEED_FORWARD},
    norm_offset=1.0,
    settings=gemma2_settings,
)
GEMMA3 = GGUFFamily(
    architecture="gemma3",
    model_type="gemma3_text",
    layer_modules={**ATTENTION, **QK_NORMS, **POST_NORMS, **FEED_FORWARD},
    norm_offset=1.0,
    settings=gemma3_settings,
)
