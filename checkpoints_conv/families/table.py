"""GGUFFamily: the names that tell one model family's GGUF files from another's. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class GGUFFamily:
    """How one `general.architecture` maps to a family of `megatron_lowbit.models.registry`.

    modules, layer_modules: canonical module -> GGUF module, for the whole model and inside a layer.
    interleaved_heads: modules whose rows GGUF reorders within each head for interleaved rotary embeddings -> the
        ModelConfig field that counts those heads.
    bias_flags: config key -> the tensor of layer 0 whose presence sets it.
    """

    architecture: str
    model_type: str
    modules: Mapping[str, str]
    layer_modules: Mapping[str, str]
    interleaved_heads: Mapping[str, str]
    bias_flags: Mapping[str, str]
