"""Fingerprint: a short name for a model's weights that survives conversion, for files that belong to one model."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from megatron_lowbit.checkpoint.reader import CheckpointReader


def fingerprint(reader: CheckpointReader) -> str:
    """Hex SHA-256 over the shapes of the network and three of its norm weights, rounded to bf16.

    The same for a Hugging Face checkpoint, what was converted from it at any tensor-parallel size and dtype, and a
    GGUF file made from it (which keeps norms in FP32). Token ids are left out: formats record different ones. It tells
    models apart, not honest from forged weights: models that share these norms exactly share a fingerprint.
    """
    config = replace(reader.config, bos_token_id=None, eos_token_ids=())
    digest = hashlib.sha256(config.digest().encode())
    layers = sorted({0, config.num_layers - 1})
    for name in ["model.norm.weight", *(f"model.layers.{layer}.input_layernorm.weight" for layer in layers)]:
        rounded = reader.read(name).to(torch.bfloat16).contiguous()
        digest.update(bytes(rounded.view(torch.uint8).numpy()))
    return digest.hexdigest()
