"""ModelConfig: the shapes of a decoder-only transformer, and nothing about how it is spread over ranks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency scaling of the rotary embedding (Hugging Face `rope_type: llama3`).

    Wavelengths longer than `original_max_position / low_freq_factor` are stretched by `factor`, those shorter than
    `original_max_position / high_freq_factor` stay, the ones between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope scaling: high_freq_factor {self.high_freq_factor} must be above low_freq_factor "
                f"{self.low_freq_factor}; correct the checkpoint's config.json"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of the network; `family` names the entry of `megatron_lowbit.models.registry` that builds it."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    tie_embeddings: bool
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size",
            "max_position",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"model config: {name} is {getattr(self, name)}, it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model config: {self.num_heads} query heads cannot share {self.num_kv_heads} key-value heads; "
                "num_heads must be a multiple of num_kv_heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"model config: head_dim is {self.head_dim}; rotary embeddings need an even one")

    @property
    def heads_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> ModelConfig:
        """Reads what `to_json` wrote; `where` names the file in errors. Raises ValueError on anything unexpected."""
        try:
            data: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON ({error}); convert the checkpoint again") from error
        known = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != known:
            got = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"{where}: expected the keys {sorted(known)}, got {got}; convert the checkpoint again")
        if data["rope_scaling"] is not None:
            data["rope_scaling"] = RopeScaling(**data["rope_scaling"])
        data["eos_token_ids"] = tuple(data["eos_token_ids"])
        return cls(**data)

    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON: equal for equal networks."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
