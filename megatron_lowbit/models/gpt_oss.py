"""gpt-oss 20B and 120B: biases everywhere, attention sinks, a window in every second layer, a clamped activation, and
all experts of a layer in two stored tensors."""

from __future__ import annotations

from typing import Any

from megatron_lowbit.config import ModelConfig
from megatron_lowbit.layers.activation import SWIGLU_ALPHA, SWIGLU_LIMIT
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

MODEL_TYPES: tuple[str, ...] = ("gpt_oss",)

#: Constants of the network that the layers have built in.
BUILT_IN = {"swiglu_alpha": SWIGLU_ALPHA, "swiglu_limit": SWIGLU_LIMIT}
QUANTISATION = "mxfp4"
YARN = dict(rope_type="yarn", factor=32.0, truncate=False, original_max_position_embeddings=4096)

tensor_sources = decoder_tensors


def config_from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """Reads a Hugging Face `config.json` of this family; `where` names the file in errors. Raises ValueError.

    Experts in MXFP4 are described as if they were not: the reader presents them so.
    """
    hf = with_defaults(
        hf, num_local_experts=128, num_experts_per_tok=4, num_key_value_heads=8, head_dim=64, sliding_window=128,
        max_position_embeddings=131072, rms_norm_eps=1e-5,
    )  # fmt: skip
    if not hf.get("rope_parameters") and not hf.get("rope_scaling"):
        hf["rope_scaling"] = YARN
    refuse_unsupported(hf, where, known=("quantization_config",))
    _refuse_other_numbers(hf, where)
    layers = integer(hf, "num_hidden_layers", where)
    bias = bool(hf.get("attention_bias", True))
    return model_config(
        hf,
        where,
        "gpt_oss",
        rope=read_rope(hf, where, theta=150000.0),
        activation="swiglu_clamped",
        attention_sinks=True,
        attention_bias=bias,
        attention_output_bias=bias,
        moe=experts_from_hf(hf, where, "intermediate_size", router_bias=True, expert_bias=True),
        **sliding_windows(hf, where, hf["sliding_window"], default=tuple(layer % 2 == 0 for layer in range(layers))),
    )


def _refuse_other_numbers(hf: dict[str, Any], where: str) -> None:
    activation(hf, where)  # "silu": the name they give to the clamped activation
    for key, value in BUILT_IN.items():
        if hf.get(key) not in (None, value):
            raise ValueError(f"{where}: {key} is {hf[key]!r}; supported: {value}, that of the published models")
    quantisation = hf.get("quantization_config")
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
    if method not in (None, QUANTISATION):
        raise ValueError(
            f"{where}: the weights are quantised ({method!r}); supported: {QUANTISATION!r}, or use the bf16 checkpoint"
        )


def stored_parts(config: ModelConfig) -> dict[str, StoredPart]:
    """All experts of a layer lie in one tensor a projection, transposed; gate and up features alternate in one."""
    moe, hidden = config.moe, config.hidden_size
    assert moe is not None
    experts, width = moe.num_experts, moe.intermediate_size
    parts = {}
    for _, prefix in moe_layers(config):
        parts[prefix + "gate.weight"] = StoredPart(prefix + "router.weight", (experts, hidden))
        parts[prefix + "gate.bias"] = StoredPart(prefix + "router.bias", (experts,))
        stored = prefix + "experts."
        for expert in range(experts):
            start = f"{stored}{expert}."
            for offset, name in enumerate(("gate_proj", "up_proj")):
                parts[f"{start}{name}.weight"] = StoredPart(
                    stored + "gate_up_proj", (experts, hidden, 2 * width), index=expert, transposed=True, start=offset,
                    stop=2 * width, step=2,
                )  # fmt: skip
                parts[f"{start}{name}.bias"] = StoredPart(
                    stored + "gate_up_proj_bias", (experts, 2 * width), index=expert, start=offset, stop=2 * width,
                    step=2,
                )  # fmt: skip
            parts[start + "down_proj.weight"] = StoredPart(
                stored + "down_proj", (experts, width, hidden), index=expert, transposed=True
            )
            parts[start + "down_proj.bias"] = StoredPart(stored + "down_proj_bias", (experts, hidden), index=expert)
    return parts
