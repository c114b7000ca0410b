"""Rotary embeddings in a Hugging Face `config.json`: `rope_theta` and `rope_scaling`, or newer `rope_parameters`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lowbit.config import RopeScaling

# `hf` is the parsed config.json and `where` names the file in errors; all raise ValueError.

KINDS = ("default", "linear", "llama3", "longrope", "yarn")


@dataclass(frozen=True)
class Rope:
    """theta: base of the frequencies. partial: the rotated share of each head."""

    theta: float
    scaling: RopeScaling | None = None
    partial: float = 1.0


def read_rope(
    hf: Mapping[str, Any], where: str, theta: float = 10000.0, aliases: Mapping[str, str] | None = None
) -> Rope:
    """The rotary embedding of all layers. theta: where the file has none. aliases: other names of kinds, by family."""
    parameters = rope_keys(hf, where)
    nested = [key for key in parameters if key.endswith("_attention")]
    if nested:
        raise ValueError(f"{where}: rope_parameters differ by layer type ({', '.join(nested)}); not in this family")
    parameters.setdefault("rope_theta", hf.get("rope_theta") or theta)
    if hf.get("partial_rotary_factor") is not None:
        parameters.setdefault("partial_rotary_factor", hf["partial_rotary_factor"])
    return rope_of(parameters, hf, where, aliases)


def rope_keys(hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The newer or the older of the two keys, whichever the file has."""
    found = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ValueError(f"{where}: rope_parameters or rope_scaling is {found!r}, it must be an object")
    return dict(found)


def rope_of(
    parameters: Mapping[str, Any], hf: Mapping[str, Any], where: str, aliases: Mapping[str, str] | None = None
) -> Rope:
    """From one set of rope parameters; the file's context lengths fill in what they leave out."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    kind = (aliases or {}).get(str(kind), kind)
    if kind not in KINDS:
        raise ValueError(f"{where}: rope type {kind!r} is not supported; supported: {', '.join(KINDS)}")
    try:
        theta, partial = float(parameters["rope_theta"]), float(parameters.get("partial_rotary_factor") or 1.0)
        if not 0 < partial <= 1:
            raise ValueError(f"{where}: partial_rotary_factor is {partial}, it must be above 0 and at most 1")
        return Rope(theta, None if kind == "default" else _scaling(kind, parameters, hf), partial)
    except KeyError as error:
        raise ValueError(f"{where}: rope type {kind!r} needs the key {error}, which is missing") from error
    except TypeError as error:
        raise ValueError(f"{where}: rope type {kind!r}: {error}") from error


def _scaling(kind: str, parameters: Mapping[str, Any], hf: Mapping[str, Any]) -> RopeScaling:
    if kind == "linear":
        return RopeScaling(kind, float(parameters["factor"]))
    maximum = hf.get("max_position_embeddings")
    # Phi-3 keeps it outside, and that goes before
    original = hf.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    original = int(maximum if original is None and maximum is not None else original or 0)
    if kind == "llama3":
        return RopeScaling(
            kind,
            float(parameters["factor"]),
            original,
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
        )
    factor = parameters.get("factor")
    if factor is None:
        if maximum is None or not original:
            raise KeyError("factor")
        factor = maximum / original
    attention_factor = parameters.get("attention_factor")
    if kind == "longrope":
        return RopeScaling(
            kind,
            float(factor),
            original,
            attention_factor=None if attention_factor is None else float(attention_factor),
            long_factors=tuple(float(value) for value in parameters["long_factor"]),
            short_factors=tuple(float(value) for value in parameters["short_factor"]),
        )
    if attention_factor is None and parameters.get("mscale") and parameters.get("mscale_all_dim"):
        above, below = (0.1 * parameters[key] * math.log(factor) + 1.0 for key in ("mscale", "mscale_all_dim"))
        attention_factor = above / below if factor > 1 else 1.0
    return RopeScaling(
        kind,
        float(factor),
        original,
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=None if attention_factor is None else float(attention_factor),
    )
