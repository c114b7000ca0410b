"""GGUFFamily: what tells one model family's GGUF files from another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoints_conv.gguf_settings import GGUFSettings

MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
FEED_FORWARD = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def nothing(settings: GGUFSettings, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a family that has none of its own."""
    return {}


@dataclass(frozen=True)
class GGUFFamily:
    """How one `general.architecture` maps to a family of `megatron_lowbit.models.registry`.

    modules, layer_modules: canonical module -> GGUF module, for the whole model and inside a layer. Tensors of all
        experts together go by "mlp.experts."; merged tensors by the Hugging Face name.
    interleaved_heads: modules whose rows GGUF reorders within each head for interleaved rotary embeddings -> the
        ModelConfig field that counts those heads.
    bias_flags: config key -> the tensor of layer 0 whose presence sets it.
    bare: canonical modules that are one tensor, which has no ".weight" behind its name.
    norm_offset: what the file adds to the weights of norms.
    partial_rotary: whether a head may be rotated in part.
    settings: the Hugging Face keys that only this family has, from the metadata and the keys that are known already;
        what it returns replaces those.
    """

    architecture: str
    model_type: str
    layer_modules: Mapping[str, str]
    modules: Mapping[str, str] = field(default_factory=lambda: MODULES)
    interleaved_heads: Mapping[str, str] = field(default_factory=dict)
    bias_flags: Mapping[str, str] = field(default_factory=dict)
    bare: tuple[str, ...] = ()
    norm_offset: float = 0.0
    partial_rotary: bool = False
    settings: Callable[[GGUFSettings, Mapping[str, Any]], dict[str, Any]] = nothing
