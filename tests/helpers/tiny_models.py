"""Tiny random models of the dense families, saved by transformers: odd sizes, few heads, every feature switched on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARED = dict(
    num_hidden_layers=2, max_position_embeddings=96, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=None,
    pad_token_id=None,
)  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    # 9 heads share 3 key-value heads of 8 features (not 81 / 9); ffn and vocabulary do not divide by anything useful
    "odd": dict(
        hidden_size=81, num_attention_heads=9, num_key_value_heads=3, head_dim=8, intermediate_size=97,
        vocab_size=131, tie_word_embeddings=False,
    ),
    # biases everywhere, tied embeddings, and a rotary embedding stretched as in Llama 3: of its wavelengths 6.3 is
    # kept, 17.7 lies in between, the others are stretched
    "biased": dict(
        hidden_size=66, num_attention_heads=6, num_key_value_heads=2, head_dim=12, intermediate_size=80,
        vocab_size=127, tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
        rope_scaling=dict(
            rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500.0,
            original_max_position_embeddings=32,
        ), rope_theta=500.0,
    ),
    # at 3 ranks one has no head, at 5 some have no head, no feature of the ffn and no token
    "sparse": dict(
        hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=3, vocab_size=4,
        tie_word_embeddings=False, bos_token_id=None,
    ),
}  # fmt: skip

_WINDOW, _FULL = "sliding_attention", "full_attention"
_SIZES = dict(hidden_size=54, num_attention_heads=6, num_key_value_heads=2, intermediate_size=37, vocab_size=71)

#: One for each family beside Llama. Windows are shorter than prompts of 40 tokens, layers of all kinds alternate, soft
#: caps are low enough to bite, attention scales are not those of the head's width.
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": dict(_SIZES, model_type="mistral", head_dim=10, sliding_window=7),
    "gemma": dict(_SIZES, model_type="gemma", num_key_value_heads=1, head_dim=14, attention_bias=True),
    "gemma2": dict(
        model_type="gemma2", num_hidden_layers=3, hidden_size=63, num_attention_heads=9, num_key_value_heads=3,
        head_dim=8, intermediate_size=41, vocab_size=73, sliding_window=7, query_pre_attn_scalar=23,
        attn_logit_softcapping=1.5, final_logit_softcapping=9.0, attention_bias=True,
    ),
    "gemma3_text": dict(
        _SIZES, model_type="gemma3_text", num_hidden_layers=4, head_dim=12, sliding_window=7, query_pre_attn_scalar=5,
        layer_types=[_WINDOW, _WINDOW, _FULL, _WINDOW], final_logit_softcapping=9.0, rope_parameters={
            _FULL: dict(rope_type="linear", factor=4.0, rope_theta=300.0),
            _WINDOW: dict(rope_type="default", rope_theta=40.0),
        },
    ),
    "qwen2": dict(
        _SIZES, model_type="qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=7, max_window_layers=1,
        num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True,
    ),
    # of its rotary embedding some features are kept, some stretched, some between
    "qwen3": dict(
        _SIZES, model_type="qwen3", head_dim=12, attention_bias=True, rope_parameters=dict(
            rope_type="yarn", factor=4.0, beta_fast=4.0, beta_slow=1.0, rope_theta=500.0,
            original_max_position_embeddings=60,
        ),
    ),
    # 8 of 12 features of a head turn, with other frequencies in sequences of more than 20 tokens
    "phi3": dict(
        _SIZES, model_type="phi3", hidden_size=72, sliding_window=9, original_max_position_embeddings=20,
        rope_parameters=dict(
            rope_type="longrope", rope_theta=100.0, partial_rotary_factor=8 / 12, short_factor=[1.0, 1.25, 1.5, 2.0],
            long_factor=[1.0, 2.0, 3.5, 5.0], original_max_position_embeddings=20,
        ),
    ),
}  # fmt: skip


class TinyModels:
    """Makes each variant once, in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models: dict[str, PreTrainedModel] = {}

    def __call__(self, variant: str) -> Path:
        """The Hugging Face folder, FP32."""
        self.hf(variant)
        return self._root / variant

    def hf(self, variant: str) -> PreTrainedModel:
        """The same model in transformers, FP32."""
        if variant not in self._models:
            model = random_model(**{**VARIANTS, **FAMILIES}[variant])
            model.save_pretrained(self._root / variant)
            self._models[variant] = model
        return self._models[variant]


def random_llama(**sizes: Any) -> PreTrainedModel:
    """A Llama of these sizes, see `random_model`."""
    return random_model("llama", **sizes)


def random_model(model_type: str = "llama", **sizes: Any) -> PreTrainedModel:
    """Weights large enough that a lost bias, a head in the wrong place or a missed token changes the logits by > 0.1.

    transformers' own initialisation (0.02) would hide nearly anything below the tolerance.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # here: every test loads this file and few need it

    torch.manual_seed(1234)
    config = AutoConfig.for_model(model_type, **{**_SHARED, **sizes})
    # written out: the fused kernels know no soft cap
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            middle = 0.0 if model_type.startswith("gemma") else 1.0
            torch.nn.init.uniform_(weight, middle - 0.3, middle + 0.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, 0.0, 0.3)
        elif "embed_tokens" in name:
            torch.nn.init.normal_(weight, 0.0, 0.5)
        else:
            torch.nn.init.normal_(weight, 0.0, 1.5 / weight.shape[1] ** 0.5)
    return model
