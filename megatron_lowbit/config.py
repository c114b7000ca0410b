"""ModelConfig: the shapes of a decoder-only transformer, and nothing about how it is spread over ranks."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

ROPE_KINDS = ("linear", "llama3", "longrope", "yarn")
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "swiglu_clamped")


@dataclass(frozen=True)
class RopeScaling:
    """How a rotary embedding is stretched beyond the context it was trained for (Hugging Face `rope_type`).

    linear: all frequencies are divided by `factor`. llama3: wavelengths longer than
    `original_max_position / low_freq_factor` are stretched by `factor`, those shorter than
    `original_max_position / high_freq_factor` stay, the ones between are interpolated. yarn: the same idea with a ramp
    between `beta_fast` and `beta_slow` turns (arXiv 2309.00071), and cosines and sines times `attention_factor`.
    longrope: a divisor for each frequency, `long_factors` beyond the original context and `short_factors` within.
    attention_factor: None for what the kind derives from `factor`.
    """

    kind: str
    factor: float
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    long_factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope scaling: kind is {self.kind!r}; known: {', '.join(ROPE_KINDS)}")
        for name in ("factor", "beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"rope scaling: {name} is {value}, it must be above 0")
        if not all(0 < value < math.inf for value in (*self.long_factors, *self.short_factors)):
            raise ValueError(
                "rope scaling: a factor of a frequency is not above 0; correct long_factor or short_factor"
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope scaling: high_freq_factor {self.high_freq_factor} must be above low_freq_factor "
                f"{self.low_freq_factor}; correct the checkpoint's config.json"
            )
        if self.kind != "linear" and self.original_max_position < 2:
            raise ValueError(f"rope scaling: {self.kind} needs the context length of the original training")


@dataclass(frozen=True)
class MoEConfig:
    """Experts of a mixture: each token is sent through `experts_per_token` of `num_experts` feed-forward blocks.

    intermediate_size: features of one expert. renormalize: weights of the chosen experts sum to 1 (else they are the
    softmax over all experts as it is). router_bias, expert_bias: those linear layers have biases. dense_layers: layers
    with a plain feed-forward block of `ModelConfig.intermediate_size` instead.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    renormalize: bool = True
    router_bias: bool = False
    expert_bias: bool = False
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"model config: {self.experts_per_token} experts a token of {self.num_experts}; it must be 1 to all"
            )
        if self.intermediate_size < 1:
            raise ValueError(f"model config: an expert has {self.intermediate_size} features, it must have at least 1")


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and features of the network; `family` names the entry of `megatron_lowbit.models.registry` behind it.

    attention_bias: biases of query, key and value; attention_output_bias: of o_proj. qk_norm: RMSNorm over each head of
    query and key. post_norms: a second norm behind attention and feed-forward block, before the residual (Gemma 2).
    norm_offset: added to the stored norm weights (1 in Gemma). attention_scale: of query times key, None for
    1/sqrt(head_dim). Soft caps: `cap * tanh(x / cap)` on attention scores and on logits. attention_sinks: a learned
    logit a head that takes part in the softmax and attends to nothing. sliding_layers: which layers see only the last
    `sliding_window` tokens (empty: none); those use `rope_local_theta` where it is given, without scaling.
    rotary_dim: leading features of a head that are rotated, None for all. embedding_scale: factor on token vectors,
    rounded to the model's dtype.
    """

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
    attention_output_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    attention_sinks: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    rope_local_theta: float | None = None
    rotary_dim: int | None = None
    activation: str = "silu"
    embedding_scale: float = 1.0
    moe: MoEConfig | None = None

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
        rotated = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if rotated % 2 or not 2 <= rotated <= self.head_dim:
            raise ValueError(
                f"model config: {rotated} of {self.head_dim} features of a head are rotated; rotary embeddings need an "
                "even number of them"
            )
        if self.rope_scaling is not None and self.rope_scaling.kind == "longrope":
            for name in ("long_factors", "short_factors"):
                found = len(getattr(self.rope_scaling, name))
                if found != rotated // 2:
                    raise ValueError(
                        f"model config: {found} {name} of the rotary embedding, there must be {rotated // 2}: one for "
                        "each pair of features"
                    )
        for name in (
            "rms_norm_eps", "rope_theta", "rope_local_theta", "attention_scale", "attention_softcap", "logits_softcap",
            "embedding_scale",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"model config: {name} is {value}, it must be above 0")
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn" and self.rope_theta == 1:
            raise ValueError("model config: rope_theta is 1, and yarn cannot stretch frequencies that are all the same")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"model config: activation {self.activation!r}; supported: {', '.join(ACTIVATIONS)}")
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise ValueError(
                f"model config: {len(self.sliding_layers)} entries say which of {self.num_layers} layers have a "
                "sliding window; there must be one for each"
            )
        if any(self.sliding_layers) and (self.sliding_window is None or self.sliding_window < 1):
            raise ValueError(f"model config: sliding_window is {self.sliding_window}, it must be at least 1")

    @property
    def sync_points(self) -> list[str]:
        """Names of the all-reduces of a forward pass, in their order."""
        blocks = "self_attn.o_proj", "mlp.down_proj"
        return [f"layers.{layer}.{block}" for layer in range(self.num_layers) for block in blocks]

    def window_of(self, layer: int) -> int | None:
        """Tokens that a token of this layer sees, itself included; None for all."""
        return self.sliding_window if self.sliding_layers and self.sliding_layers[layer] else None

    def is_moe(self, layer: int) -> bool:
        return self.moe is not None and layer not in self.moe.dense_layers

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
        known = {field.name: field.default for field in fields(cls)}
        required = {name for name, default in known.items() if default is MISSING}
        if not isinstance(data, dict) or not required <= set(data) <= set(known):
            got = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"{where}: expected the keys {sorted(known)}, got {got}; convert the checkpoint again")
        try:
            for name, kind in (("rope_scaling", RopeScaling), ("moe", MoEConfig)):
                if data.get(name) is not None:
                    data[name] = kind(**_frozen(data[name]))
            return cls(**_frozen(data))
        except TypeError as error:
            raise ValueError(f"{where}: {error}; convert the checkpoint again") from error

    def digest(self) -> str:
        """Hex SHA-256 of the canonical JSON: equal for equal networks."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def _frozen(data: dict[str, Any]) -> dict[str, Any]:
    """The same with tuples for the lists that JSON has."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
