"""What all families read alike in a Hugging Face `config.json`: shapes, special tokens, activations, layer types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.hf_rope import Rope, read_rope

# `hf` is the parsed config.json and `where` names the file in errors; all raise ValueError.

REQUIRED = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}
#: What a file may ask for before anything is allocated.
LARGEST = {"num_hidden_layers": 10_000}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
SLIDING, FULL = "sliding_attention", "full_attention"

#: Keys that change what a network computes and that no family here knows, with the values that mean "off".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "no_rope_layers": (None, []),
    "quantization_config": (None,),
    "residual_multiplier": (None, 1, 1.0),
    "use_bidirectional_attention": (None, False),
}


def model_config(hf: Mapping[str, Any], where: str, family: str, rope: Rope | None = None, **own: Any) -> ModelConfig:
    """ModelConfig of the keys that all families share and of `own`, which goes before them.

    rope: what `read_rope` found where a family reads it its own way; by default over whole heads.
    """
    missing = [key for key in REQUIRED.values() if hf.get(key) is None]
    if missing:
        raise ValueError(f"{where}: the key {missing[0]!r} is missing; it must hold the shapes of a {family} model")
    shapes = {name: integer(hf, key, where) for name, key in REQUIRED.items()}
    heads = shapes["num_heads"]
    head_dim = integer(hf, "head_dim", where, shapes["hidden_size"] // max(heads, 1))
    rope = read_rope(hf, where) if rope is None else rope
    if rope.partial != 1.0:
        own.setdefault("rotary_dim", int(head_dim * rope.partial))
    common: dict[str, Any] = dict(
        shapes,
        num_kv_heads=integer(hf, "num_key_value_heads", where, heads),
        head_dim=head_dim,
        max_position=integer(hf, "max_position_embeddings", where, 2048),
        rms_norm_eps=number(hf, "rms_norm_eps", where, 1e-6),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        bos_token_id=next(iter(tokens(hf, "bos_token_id", where)), None),
        eos_token_ids=tokens(hf, "eos_token_id", where),
    )
    return ModelConfig(family=family, **{**common, **own})


def with_defaults(hf: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """`hf` with the values that transformers' config class of the family has where a key is absent (not where null)."""
    return {**defaults, **hf}


def refuse_unsupported(hf: Mapping[str, Any], where: str, known: tuple[str, ...] = ()) -> None:
    """ValueError where a key asks for a computation that is not implemented. known: keys this family does read."""
    for key, harmless in UNSUPPORTED.items():
        if key not in known and hf.get(key) not in harmless:
            raise ValueError(
                f"{where}: {key} is {hf[key]!r}, which changes what the model computes and is not supported; "
                f"supported: {', '.join(repr(value) for value in harmless)}"
            )


def integer(hf: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = hf.get(key)
    value = default if value is None else value
    largest = LARGEST.get(key, 2**31)
    if type(value) is not int or value > largest:
        raise ValueError(f"{where}: {key} is {value!r}, it must be a whole number of at most {largest}")
    return value


def number(hf: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = hf.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {key} is {value!r}, it must be a number")
    return float(value)


def number_or_none(hf: Mapping[str, Any], key: str, where: str) -> float | None:
    return None if hf.get(key) is None else number(hf, key, where)


def activation(hf: Mapping[str, Any], where: str, key: str = "hidden_act", default: str = "silu") -> str:
    """ModelConfig's name of the activation under `key`."""
    name = hf.get(key) or default
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{where}: {key} is {name!r}; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def tokens(hf: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    """Of a key that holds none, one or several."""
    found = hf.get(key)
    listed = [] if found is None else found if isinstance(found, list) else [found]
    if any(type(token) is not int for token in listed):
        raise ValueError(f"{where}: {key} is {found!r}, it must be a token id or a list of them")
    return tuple(listed)


def sliding_windows(hf: Mapping[str, Any], where: str, window: int | None, default: tuple[bool, ...]) -> dict[str, Any]:
    """`sliding_window` and `sliding_layers` of ModelConfig, by `layer_types` where the file has it, else `default`."""
    kinds = hf.get("layer_types")
    layers = default
    if kinds is not None:
        if not isinstance(kinds, list):
            raise ValueError(f"{where}: layer_types is {kinds!r}, it must be a list with a name for each layer")
        unknown = sorted({str(kind) for kind in kinds} - {SLIDING, FULL})
        if unknown:
            raise ValueError(f"{where}: layer_types has {unknown[0]!r}; supported: {SLIDING!r}, {FULL!r}")
        layers = tuple(kind == SLIDING for kind in kinds)
    if not any(layers):
        return {}
    if window is None:
        raise ValueError(f"{where}: layer_types has {SLIDING!r}, but sliding_window is null; give its length in tokens")
    return {"sliding_window": integer({"sliding_window": window}, "sliding_window", where), "sliding_layers": layers}
