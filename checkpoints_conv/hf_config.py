"""config_to_hf: the config.json that transformers reads for a model, where its source brought none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_lowbit.config import ModelConfig, RopeScaling
from megatron_lowbit.models.registry import config_from_hf

# family: what transformers calls the model, and the class of its language model
CLASSES = {
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "gpt_oss": ("gpt_oss", "GptOssForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "mixtral": ("mixtral", "MixtralForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "swiglu_clamped": "silu"}
# RopeScaling's field: the key in rope_scaling, for each kind
ROPE_KEYS = {
    "linear": {},
    "llama3": {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    "longrope": {"long_factors": "long_factor", "short_factors": "short_factor"},
    "yarn": {"beta_fast": "beta_fast", "beta_slow": "beta_slow", "truncate": "truncate"},
}  # fmt: skip


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The keys of a Hugging Face config.json that say what `config` says, and nothing else.

    Read again, they give the same `config`: ValueError where they would not.
    """
    if config.family not in CLASSES:
        raise ValueError(f"a config.json for the family {config.family!r} cannot be written; known: {sorted(CLASSES)}")
    model_type, architecture = CLASSES[config.family]
    hf = {"architectures": [architecture], "model_type": model_type, **_shapes(config), **_attention(config)}
    if config.moe is not None:
        hf |= _experts(config)
    lost = _differences(config, config_from_hf(dict(hf), "the written config.json"))
    if lost:
        raise ValueError(f"a config.json of the family {config.family!r} cannot say what {', '.join(lost)} is here")
    return hf


def _shapes(config: ModelConfig) -> dict[str, Any]:
    act = ACTIVATIONS[config.activation]
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": None,
        "head_dim": config.head_dim,
        "hidden_act": act,
        "hidden_activation": act,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position,
        "mlp_bias": config.mlp_bias,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }


def _attention(config: ModelConfig) -> dict[str, Any]:
    hf: dict[str, Any] = {
        "attention_bias": config.attention_bias,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else _rope_scaling(config.rope_scaling),
        "sliding_window": config.sliding_window if any(config.sliding_layers) else None,
    }
    if config.rotary_dim is not None:
        hf["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
        hf["original_max_position_embeddings"] = config.rope_scaling.original_max_position
    if config.family.startswith(("gemma", "gpt_oss", "qwen")):
        windows = config.sliding_layers or (False,) * config.num_layers
        hf["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
        hf["use_sliding_window"] = any(windows)
    if config.family.startswith("gemma"):
        hf["query_pre_attn_scalar"] = _scalar(config.attention_scale or config.head_dim**-0.5)
        hf["attn_logit_softcapping"] = config.attention_softcap
        hf["final_logit_softcapping"] = config.logits_softcap
    if config.rope_local_theta is not None:
        hf["rope_local_base_freq"] = config.rope_local_theta
    return hf


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    settings: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    for field, key in ROPE_KEYS[scaling.kind].items():
        value = getattr(scaling, field)
        settings[key] = list(value) if isinstance(value, tuple) else value
    if scaling.kind != "linear":
        settings["original_max_position_embeddings"] = scaling.original_max_position
    if scaling.attention_factor is not None:
        settings["attention_factor"] = scaling.attention_factor
    return settings


def _experts(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    hf: dict[str, Any] = {
        "num_experts_per_tok": moe.experts_per_token,
        "norm_topk_prob": moe.renormalize,
        "router_aux_loss_coef": 0.0,
    }
    if config.family == "qwen3_moe":
        return hf | {
            "num_experts": moe.num_experts,
            "moe_intermediate_size": moe.intermediate_size,
            "mlp_only_layers": list(moe.dense_layers),
            "decoder_sparse_step": 1,
        }
    return hf | {"num_local_experts": moe.num_experts, "intermediate_size": moe.intermediate_size}


def _scalar(scale: float) -> float:
    """The number whose inverse root is `scale`: a whole one where it fits."""
    near = round(scale**-2)
    return near if near and near**-0.5 == scale else scale**-2


def _differences(config: ModelConfig, other: ModelConfig) -> list[str]:
    """Fields in which two configs differ, the order of tokens that end a text aside."""
    if replace(other, eos_token_ids=config.eos_token_ids) == config and set(other.eos_token_ids) == set(
        config.eos_token_ids
    ):
        return []
    return [name for name in config.__dataclass_fields__ if getattr(config, name) != getattr(other, name)]
