"""GGUFSettings: the metadata of a GGUF file that describe its network, read strictly."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_conv.gguf_header import GGUFHeader

# Settings that change what the network computes and that no supported architecture needs: only their neutral value is
# taken.
NEUTRAL: Mapping[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.output_scale": 0.0,
    "attention.scale": 0.0,
    "attention.shared_kv_layers": 0,
    "attention.temperature_length": 0,
    "attention.temperature_scale": 0.0,
    "embedding_scale": 0.0,
    "expert_group_count": 0,
    "expert_shared_count": 0,
    "expert_weights_scale": 0.0,
    "leading_dense_block_count": 0,
    "logit_scale": 0.0,
    "nextn_predict_layers": 0,
    "residual_scale": 0.0,
    "rope.dimension_count_swa": None,
    "rope.scaling.alpha": 0.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "router_logit_softcapping": 0.0,
    "use_parallel_residual": False,
}


class GGUFSettings:
    """`path` names the file in errors. All methods raise ValueError for a value that cannot be meant."""

    def __init__(self, path: Path, header: GGUFHeader, architecture: str) -> None:
        self.path = path
        self.tensors: Collection[str] = header.tensors
        start = architecture + "."
        self._values = {
            key.removeprefix(start): value for key, value in header.metadata.items() if key.startswith(start)
        }
        for name, neutral in NEUTRAL.items():
            if name in self._values and self._values[name] != neutral:
                raise ValueError(
                    f"{path}: metadata {name} is {self._values[name]!r}, which is not supported; convert the Hugging "
                    "Face checkpoint of this model instead"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number, the same for all layers; `default` where the file is silent."""
        value = self._values.get(name, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if type(value) is not int or value < least:
            raise ValueError(
                f"{self.path}: metadata {name} is {value!r}, expected a whole number from {least} on, the same for all "
                "layers"
            )
        return value

    def decimal(self, name: str, default: float | None = None) -> float:
        """The shortest decimal that rounds to the stored FP32: 1e-05, not 9.999999747378752e-06, as config.json has."""
        value = self._values.get(name, default)
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{self.path}: metadata {name} is {value!r}, expected a positive number")
        return float(str(np.float32(value)))

    def text(self, name: str, default: str) -> str:
        value = self._values.get(name, default)
        if not isinstance(value, str):
            raise ValueError(f"{self.path}: metadata {name} is {value!r}, expected text")
        return value
