"""Gemma 1, 2 and 3 (text): norm weights stored less 1, scaled token vectors; in the later ones also norms behind each
block, windows in most layers, soft caps (2), normed queries and keys and two rotary embeddings (3)."""

from __future__ import annotations

from typing import Any

from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.hf_config import (
    FULL,
    SLIDING,
    activation,
    integer,
    model_config,
    number,
    number_or_none,
    refuse_unsupported,
    sliding_windows,
    with_defaults,
)
from megatron_lowbit.models.hf_rope import Rope, read_rope, rope_keys, rope_of
from megatron_lowbit.models.table import decoder_tensors, stored_under_own_names

MODEL_TYPES: tuple[str, ...] = ("gemma", "gemma2", "gemma3", "gemma3_text")

#: What transformers assumes where a key is absent; published files leave much of it out.
DEFAULTS: dict[str, Any] = dict(
    head_dim=256, tie_word_embeddings=True, bos_token_id=2, eos_token_id=1, hidden_activation="gelu_pytorch_tanh"
)
GEMMA2_DEFAULTS = dict(
    DEFAULTS, max_position_embeddings=8192, num_key_value_heads=4, query_pre_attn_scalar=256, sliding_window=4096,
    attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
)  # fmt: skip
GEMMA3_DEFAULTS = dict(
    DEFAULTS, vocab_size=262_208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=131_072, query_pre_attn_scalar=256, sliding_window=4096,
    sliding_window_pattern=6,
)  # fmt: skip

tensor_sources = decoder_tensors
stored_parts = stored_under_own_names


def config_from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """Reads a Hugging Face `config.json` of this family; `where` names the file in errors. Raises ValueError."""
    kind = hf["model_type"]
    if kind == "gemma":
        return _gemma1(with_defaults(hf, max_position_embeddings=8192, **DEFAULTS), where)
    if kind == "gemma2":
        return _gemma2(with_defaults(hf, **GEMMA2_DEFAULTS), where)
    return _gemma3(with_defaults(text_config(hf, where), **GEMMA3_DEFAULTS), where)


def text_config(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """What concerns the language model of a config that may nest it beside a vision model's."""
    if hf["model_type"] != "gemma3":
        return hf
    nested = hf.get("text_config")
    if not isinstance(nested, dict):
        raise ValueError(f"{where}: the key 'text_config' is missing; a gemma3 model keeps its shapes there")
    shared = ("bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config")
    return {**{key: hf[key] for key in shared if key in hf}, **nested}


def _common(hf: dict[str, Any], where: str) -> dict[str, Any]:
    refuse_unsupported(hf, where)
    bias = bool(hf.get("attention_bias", False))
    return dict(
        norm_offset=1.0,
        embedding_scale=integer(hf, "hidden_size", where) ** 0.5,
        attention_bias=bias,
        attention_output_bias=bias,
    )


def _attention_scale(hf: dict[str, Any], where: str) -> float:
    width = number(hf, "query_pre_attn_scalar", where, 256.0)
    if width <= 0:
        raise ValueError(f"{where}: query_pre_attn_scalar is {width}, it must be above 0")
    return float(width**-0.5)


def _gemma1(hf: dict[str, Any], where: str) -> ModelConfig:
    # the first files say "gelu" and mean its approximation; transformers reads hidden_act alone
    name = hf.get("hidden_act") or "gelu_pytorch_tanh"
    hf["hidden_act"] = "gelu_pytorch_tanh" if name == "gelu" else name
    return model_config(hf, where, "gemma", activation=activation(hf, where), **_common(hf, where))


def _gemma2(hf: dict[str, Any], where: str) -> ModelConfig:
    even = tuple(layer % 2 == 0 for layer in range(integer(hf, "num_hidden_layers", where)))
    return model_config(
        hf,
        where,
        "gemma2",
        activation=activation(hf, where, "hidden_activation", "gelu_pytorch_tanh"),
        post_norms=True,
        attention_scale=_attention_scale(hf, where),
        attention_softcap=number_or_none(hf, "attn_logit_softcapping", where),
        logits_softcap=number_or_none(hf, "final_logit_softcapping", where),
        **sliding_windows(hf, where, hf["sliding_window"], default=even),
        **_common(hf, where),
    )


def _gemma3(hf: dict[str, Any], where: str) -> ModelConfig:
    if hf.get("attn_logit_softcapping") is not None:
        raise ValueError(
            f"{where}: attn_logit_softcapping is {hf['attn_logit_softcapping']!r}; in Gemma 3 it must be null, since "
            "implementations disagree on what it does there"
        )
    layers, pattern = integer(hf, "num_hidden_layers", where), integer(hf, "sliding_window_pattern", where, 6)
    if pattern < 1:
        raise ValueError(f"{where}: sliding_window_pattern is {pattern}, it must be at least 1")
    rope, local = _gemma3_ropes(hf, where)
    return model_config(
        hf,
        where,
        "gemma3",
        rope=rope,
        rope_local_theta=local.theta,
        activation=activation(hf, where, "hidden_activation", "gelu_pytorch_tanh"),
        post_norms=True,
        qk_norm=True,
        attention_scale=_attention_scale(hf, where),
        logits_softcap=number_or_none(hf, "final_logit_softcapping", where),
        **sliding_windows(
            hf, where, hf["sliding_window"], default=tuple((layer + 1) % pattern != 0 for layer in range(layers))
        ),
        **_common(hf, where),
    )


def _gemma3_ropes(hf: dict[str, Any], where: str) -> tuple[Rope, Rope]:
    """(of layers that see everything, of those with a window)."""
    nested = rope_keys(hf, where)
    local_theta = number(hf, "rope_local_base_freq", where, 1e4)
    if FULL not in nested and SLIDING not in nested:
        return read_rope(hf, where, theta=1e6), Rope(local_theta)
    full, sliding = (nested.get(key) or {} for key in (FULL, SLIDING))
    if not isinstance(full, dict) or not isinstance(sliding, dict):
        raise ValueError(f"{where}: rope_parameters is {nested!r}, each layer type must have an object there")
    full = {"rope_theta": hf.get("rope_theta") or 1e6, **full}
    sliding = {"rope_theta": local_theta, **sliding}
    local = rope_of(sliding, hf, where)
    if local.scaling is not None or local.partial != 1.0:
        raise ValueError(f"{where}: the rotary embedding of {SLIDING!r} layers is scaled; supported: 'default' there")
    return rope_of(full, hf, where), local
