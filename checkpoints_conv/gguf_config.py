"""From GGUF metadata to ModelConfig, by way of the Hugging Face keys that the model families already read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints_conv.families.table import GGUFFamily
from checkpoints_conv.gguf_header import GGUFHeader
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.registry import config_from_hf

# Hugging Face key -> GGUF key after "<architecture>."
INTEGERS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
END_TOKEN_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# GGUF stores Llama 3's frequency scaling as one divisor a frequency; these are the settings of all Llama 3.x models
LLAMA3_LOW_FREQ_FACTOR = 1.0
LLAMA3_HIGH_FREQ_FACTOR = 4.0
LLAMA3_ORIGINAL_MAX_POSITION = 8192
# the divisors are stored in FP32 and computed there in a few roundings of 2^-24 each
DIVISOR_TOLERANCE = 1e-4


def read_config(path: Path, header: GGUFHeader, family: GGUFFamily, rope_divisors: torch.Tensor | None) -> ModelConfig:
    """Raises ValueError where metadata is missing or asks for what is not supported; `path` names the file in it.

    rope_divisors: `[head_dim / 2]` fp32, the file's `rope_freqs.weight` if it has one.
    """
    metadata = {
        key.removeprefix(family.architecture + "."): value
        for key, value in header.metadata.items()
        if key.startswith(family.architecture + ".")
    }
    if metadata.get("expert_count", 0):
        raise ValueError(f"{path}: a mixture of {metadata['expert_count']} experts; only dense models are supported")
    hf: dict[str, Any] = {"model_type": family.model_type}
    for key, name in INTEGERS.items():
        hf[key] = _integer(path, metadata, name)
    if hf["num_hidden_layers"] > len(header.tensors):
        raise ValueError(
            f"{path}: {hf['num_hidden_layers']} layers but {len(header.tensors)} tensors; download it again"
        )
    if "token_embd.weight" not in header.tensors:
        raise ValueError(f"{path}: tensor token_embd.weight is missing; it is not the file of a whole model")
    hf["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    hf["num_key_value_heads"] = _integer(path, metadata, "attention.head_count_kv", hf["num_attention_heads"])
    hf["head_dim"] = _integer(path, metadata, "attention.key_length", hf["hidden_size"] // hf["num_attention_heads"])
    if metadata.get("attention.sliding_window"):
        hf["sliding_window"] = _integer(path, metadata, "attention.sliding_window")
    hf["rms_norm_eps"] = _decimal(path, metadata, "attention.layer_norm_rms_epsilon")
    theta = _decimal(path, metadata, "rope.freq_base", 10000.0)
    rotated = _integer(path, metadata, "rope.dimension_count", hf["head_dim"])
    if rotated != hf["head_dim"]:
        raise ValueError(
            f"{path}: rotary embeddings over {rotated} of {hf['head_dim']} dimensions; only the full width is supported"
        )
    scaling = metadata.get("rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"{path}: rope scaling {scaling!r} is not supported; supported: none, and that of Llama 3")
    hf["rope_theta"] = theta
    if rope_divisors is not None:
        hf["rope_scaling"] = _llama3_scaling(path, rope_divisors, theta, hf["head_dim"])
    hf["tie_word_embeddings"] = "output.weight" not in header.tensors
    for key, tensor in family.bias_flags.items():
        hf[key] = f"blk.0.{tensor}" in header.tensors
    hf["bos_token_id"] = header.metadata.get("tokenizer.ggml.bos_token_id")
    ends = {header.metadata.get(f"tokenizer.ggml.{key}") for key in END_TOKEN_KEYS} - {None}
    hf["eos_token_id"] = sorted(ends) or None
    return config_from_hf(hf, str(path))


def _integer(path: Path, metadata: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = metadata.get(name, default)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if type(value) is not int or value < 1:
        raise ValueError(
            f"{path}: metadata {name} is {value!r}, expected a positive whole number, the same for all layers"
        )
    return value


def _decimal(path: Path, metadata: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """The shortest decimal that rounds to the stored FP32: 1e-05, not 9.999999747378752e-06, as config.json has it."""
    value = metadata.get(name, default)
    if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{path}: metadata {name} is {value!r}, expected a positive number")
    return float(str(np.float32(value)))


def _llama3_scaling(path: Path, divisors: torch.Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The Hugging Face settings that give exactly these divisors. Raises ValueError if none are known."""
    factor = float(divisors.max())
    settings = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": LLAMA3_ORIGINAL_MAX_POSITION,
    }
    expected = llama3_divisors(theta, head_dim, factor)
    if divisors.shape != expected.shape or not torch.allclose(divisors.double(), expected, rtol=DIVISOR_TOLERANCE):
        raise ValueError(
            f"{path}: rope_freqs.weight is not the frequency scaling of Llama 3 (low_freq_factor 1, "
            "high_freq_factor 4, 8192 positions); convert the Hugging Face checkpoint of this model instead"
        )
    return settings


def llama3_divisors(theta: float, head_dim: int, factor: float) -> torch.Tensor:
    """`[head_dim / 2]` fp64: what each rotary frequency is divided by under Llama 3's scaling."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    periods = LLAMA3_ORIGINAL_MAX_POSITION * frequency / (2 * math.pi)
    smooth = (periods - LLAMA3_LOW_FREQ_FACTOR) / (LLAMA3_HIGH_FREQ_FACTOR - LLAMA3_LOW_FREQ_FACTOR)
    smooth = smooth.clamp(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
