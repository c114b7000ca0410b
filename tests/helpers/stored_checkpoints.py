"""Hugging Face checkpoints of every family, written tensor by tensor: random bits, and no transformers needed.

The merged tensors are put together here from StoredPart's own words, apart from the code that is tested.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.registry import config_from_hf, stored_parts, tensor_sources

_SHARED: dict[str, Any] = dict(
    hidden_size=12, intermediate_size=10, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=4,
    vocab_size=17, max_position_embeddings=64, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2, pad_token_id=None,
)  # fmt: skip
_EXPERTS = dict(num_experts_per_tok=2, num_local_experts=3)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "mistral": dict(model_type="mistral", sliding_window=16),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", tie_word_embeddings=True),
    "gemma": dict(model_type="gemma"),
    "gemma2": dict(model_type="gemma2", query_pre_attn_scalar=8, sliding_window=16),
    "gemma3": dict(model_type="gemma3_text", query_pre_attn_scalar=8, sliding_window=16, sliding_window_pattern=2),
    "phi3": dict(model_type="phi3"),
    "mixtral": dict(model_type="mixtral", sliding_window=None, **_EXPERTS),
    "qwen3_moe": dict(
        model_type="qwen3_moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=7, mlp_only_layers=[1],
        norm_topk_prob=True, decoder_sparse_step=1,
    ),
    "gpt_oss": dict(
        model_type="gpt_oss", layer_types=["sliding_attention", "full_attention"], sliding_window=16,
        attention_bias=True, rope_theta=150000,
        rope_scaling=dict(
            rope_type="yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
            original_max_position_embeddings=16,
        ), **_EXPERTS,
    ),
}  # fmt: skip


def hf_config(family: str, **sizes: Any) -> dict[str, Any]:
    """A tiny config.json with every tensor that the family knows."""
    return {**_SHARED, **FAMILIES[family], **sizes}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Any finite bit pattern: subnormal numbers, both zeros and the largest numbers too."""
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(integer)
    bits = torch.randint(limits.min, limits.max + 1, shape, generator=generator, dtype=torch.int64).to(integer)
    values = bits.view(dtype)
    return torch.where(values.isfinite(), values, torch.tensor(-0.0, dtype=dtype))


def canonical_tensors(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: random_bits(source.shape, dtype, generator) for name, source in tensor_sources(config).items()}


def stored_tensors(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a Hugging Face file holds; checks that parts cover every element exactly once."""
    parts = stored_parts(config)
    stored = {name: tensor for name, tensor in tensors.items() if name not in parts}
    covered: dict[str, torch.Tensor] = {}
    for name, part in parts.items():
        whole = stored.setdefault(part.name, torch.zeros(part.shape, dtype=tensors[name].dtype))
        count = covered.setdefault(part.name, torch.zeros(part.shape, dtype=torch.int32))
        for target, values in ((whole, tensors[name]), (count, None)):
            seen = target if part.index is None else target[part.index]
            seen = seen.transpose(0, 1) if part.transposed else seen
            stop = seen.shape[0] if part.stop is None else part.stop
            for row, position in enumerate(range(part.start, stop, part.step)):
                if values is None:
                    seen[position] += 1
                else:
                    seen[position] = values[row]
    for name, count in covered.items():
        assert bool((count == 1).all()), name
    return stored


def write_checkpoint(
    directory: Path,
    hf: dict[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    seed: int = 0,
    kind: str = "safetensors",
) -> dict[str, torch.Tensor]:
    """Writes the folder; the canonical tensors in it. kind: "safetensors" or "bin"."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf))
    config = config_from_hf(dict(hf), "test")
    tensors = canonical_tensors(config, dtype, seed)
    stored = stored_tensors(config, tensors)
    single, index = {
        "safetensors": ("model.safetensors", "model.safetensors.index.json"),
        "bin": ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    }[kind]
    save = save_file if kind == "safetensors" else torch.save
    if shards == 1:
        save(stored, directory / single)
        return tensors
    stem, _, ending = single.rpartition(".")
    size = math.ceil(len(stored) / shards)
    weight_map = {name: f"{stem}-{place // size}.{ending}" for place, name in enumerate(stored)}
    for file in set(weight_map.values()):
        save({name: stored[name] for name in stored if weight_map[name] == file}, directory / file)
    (directory / index).write_text(json.dumps({"weight_map": weight_map}))
    return tensors
