"""Tiny random Llama models, saved by transformers: odd sizes, few heads, biases, tied embeddings, scaled rotary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

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


class TinyModels:
    """Makes each variant once, in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models: dict[str, LlamaForCausalLM] = {}

    def __call__(self, variant: str) -> Path:
        """The Hugging Face folder, FP32."""
        self.hf(variant)
        return self._root / variant

    def hf(self, variant: str) -> LlamaForCausalLM:
        """The same model in transformers, FP32."""
        if variant not in self._models:
            model = random_llama(**VARIANTS[variant])
            model.save_pretrained(self._root / variant)
            self._models[variant] = model
        return self._models[variant]


def random_llama(**sizes: Any) -> LlamaForCausalLM:
    """Weights large enough that a lost bias, a head in the wrong place or a missed token changes the logits by > 0.1.

    transformers' own initialisation (0.02) would hide nearly anything below the tolerance.
    """
    from transformers import LlamaConfig, LlamaForCausalLM  # here, since every test loads this file and few need it

    torch.manual_seed(1234)
    model = LlamaForCausalLM(LlamaConfig(**{**_SHARED, **sizes})).float().eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.7, 1.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, 0.0, 0.3)
        elif "embed_tokens" in name:
            torch.nn.init.normal_(weight, 0.0, 0.5)
        else:
            torch.nn.init.normal_(weight, 0.0, 1.5 / weight.shape[1] ** 0.5)
    return model
