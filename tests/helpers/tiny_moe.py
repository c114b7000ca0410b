"""Tiny random mixtures of experts, saved by transformers in the layout of the published checkpoints, and how to read
them without the project's readers: an independent second way from stored to canonical tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_lowbit.config import ModelConfig
from megatron_lowbit.layers.sharded import sharded_parameters
from megatron_lowbit.models.decoder import Decoder
from megatron_lowbit.models.registry import stored_parts, tensor_sources
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.weights import ModelWeights

_SHARED = dict(
    max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=None, pad_token_id=None,
    rope_theta=1000.0, tie_word_embeddings=False,
)  # fmt: skip
_QWEN3 = dict(
    hidden_size=42, num_attention_heads=6, num_key_value_heads=2, head_dim=10, intermediate_size=29, vocab_size=73,
    num_hidden_layers=3, num_experts=7, num_experts_per_tok=3, moe_intermediate_size=13,
)  # fmt: skip

#: name -> (model_type, keys of its config)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "mixtral",
        dict(
            hidden_size=45, num_attention_heads=6, num_key_value_heads=2, head_dim=8, intermediate_size=23,
            vocab_size=71, num_hidden_layers=2, num_local_experts=5, num_experts_per_tok=2, sliding_window=11,
        ),
    ),
    # a dense layer between two of experts; the weights of the chosen experts sum to 1
    "qwen3": ("qwen3_moe", dict(_QWEN3, norm_topk_prob=True, mlp_only_layers=[1])),
    # ... or are what the softmax over all experts gave; every second layer is dense; attention has biases and a window
    "qwen3-raw": (
        "qwen3_moe",
        dict(
            _QWEN3, norm_topk_prob=False, decoder_sparse_step=2, attention_bias=True, tie_word_embeddings=True,
            use_sliding_window=True, sliding_window=9,
        ),
    ),
    # experts as wide as the residual, as published: a product with the transposed weight would not fail by its shape.
    # With 16 of original context and a factor of 4, some frequencies are kept, some stretched, some between.
    "gpt-oss": (
        "gpt_oss",
        dict(
            hidden_size=38, num_attention_heads=6, num_key_value_heads=2, head_dim=12, intermediate_size=38,
            vocab_size=77, num_hidden_layers=3, num_local_experts=6, num_experts_per_tok=3, sliding_window=7,
            max_position_embeddings=64, rope_parameters=dict(
                rope_type="yarn", factor=4.0, beta_fast=4.0, beta_slow=1.0, truncate=False, rope_theta=500.0,
                original_max_position_embeddings=16,
            ),
        ),
    ),
}  # fmt: skip


class TinyMoE:
    """Makes each variant once, in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._models: dict[str, Any] = {}

    def __call__(self, variant: str) -> Path:
        """The Hugging Face folder, FP32."""
        self.hf(variant)
        return self._root / variant

    def hf(self, variant: str) -> Any:
        """The same model in transformers, FP32, with the plain loop over experts and written-out attention."""
        if variant not in self._models:
            self._models[variant] = random_moe(*VARIANTS[variant])
            self._models[variant].save_pretrained(self._root / variant)
        return self._models[variant]

    def hf_logits(self, variant: str, prompt: list[int]) -> torch.Tensor:
        """FP32 `[T, V]`."""
        with torch.no_grad():
            return self.hf(variant)(torch.tensor([prompt])).logits[0]

    def canonical(self, variant: str, config: ModelConfig) -> dict[str, torch.Tensor]:
        """Every tensor by its canonical name."""
        return follow_stored_parts(config, load_file(self(variant) / "model.safetensors"))


def random_moe(model_type: str, sizes: dict[str, Any]) -> Any:
    """Weights of a size that lets every part show in the logits (see `tiny_models.random_llama`)."""
    from transformers import AutoConfig, AutoModelForCausalLM  # here, since few of the tests that load this need it

    torch.manual_seed(4321)
    config = AutoConfig.for_model(model_type, **{**_SHARED, **sizes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    model = model.float().eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.7, 1.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, 0.0, 0.5)
        elif name.endswith("sinks"):
            torch.nn.init.normal_(weight, 1.0, 1.0)
        elif "embed_tokens" in name:
            torch.nn.init.normal_(weight, 0.0, 0.5)
        else:
            transposed = model_type == "gpt_oss" and weight.dim() == 3
            columns = weight.shape[1 if transposed else -1]
            # gpt-oss clamps gate and up at 7
            size = 5.0 if transposed and "gate_up" in name else 1.5
            torch.nn.init.normal_(weight, 0.0, size / columns**0.5)
    return model


def follow_stored_parts(config: ModelConfig, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Canonical tensors from those of a file; every one of these must be used."""
    parts, canonical, used = stored_parts(config), {}, set()
    for name in tensor_sources(config):
        part = parts.get(name)
        tensor = stored[name if part is None else part.name]
        used.add(name if part is None else part.name)
        if part is not None:
            assert tuple(tensor.shape) == part.shape, (name, part, tensor.shape)
            tensor = tensor if part.index is None else tensor[part.index]
            tensor = tensor.T if part.transposed else tensor
            tensor = tensor[part.start : part.stop : part.step]
        canonical[name] = tensor.contiguous()
    assert used == set(stored), set(stored) - used
    return canonical


def weights_of(config: ModelConfig, canonical: dict[str, torch.Tensor], context: ParallelContext) -> ModelWeights:
    """This process's FP32 shards of canonical tensors."""
    tensors = {}
    skeleton = Decoder(context, config, torch.float32, lambda name: lambda *tensors: tensors[0])
    for name, parameter, sources in sharded_parameters(skeleton):
        shards = []
        for source in sources:
            assert canonical[source.name].shape == source.shape, source.name
            start, stop = (0, None) if source.rule.dim is None else source.rule.span(*context.shard)
            index = [slice(None)] * len(source.shape)
            index[source.rule.dim or 0] = slice(start, stop)
            shards.append(canonical[source.name][tuple(index)])
        tensors[name] = torch.cat(shards).to(parameter.dtype)
    return ModelWeights(config, context, torch.float32, "tiny", tensors)
