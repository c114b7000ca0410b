"""Rotary embeddings in GGUF files, as the Hugging Face settings that the model families read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from checkpoints_conv.gguf_settings import GGUFSettings

DIVISORS, LONG_FACTORS, SHORT_FACTORS = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (DIVISORS, LONG_FACTORS, SHORT_FACTORS)
SCALING_TYPES = ("none", "linear", "longrope", "yarn")
# GGUF stores Llama 3's frequency scaling as one divisor a frequency; these are the settings of all Llama 3.x models
LLAMA3_LOW_FREQ_FACTOR = 1.0
LLAMA3_HIGH_FREQ_FACTOR = 4.0
LLAMA3_ORIGINAL_MAX_POSITION = 8192
# the divisors are stored in FP32 and computed there in a few roundings of 2^-24 each
DIVISOR_TOLERANCE = 1e-4


def rope_scaling(
    settings: GGUFSettings, tensors: Mapping[str, torch.Tensor], theta: float, rotated: int
) -> dict[str, Any] | None:
    """Hugging Face's `rope_scaling`, None for none. Raises ValueError for what those settings cannot say.

    tensors: those of ROPE_TENSORS that the file holds, `[rotated / 2]` fp32 each.
    """
    if DIVISORS in tensors:
        return _llama3(settings, tensors[DIVISORS], theta, rotated)
    kind = settings.text("rope.scaling.type", "none")
    if LONG_FACTORS in tensors and SHORT_FACTORS in tensors:
        kind = "longrope"  # older files do not name it
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": settings.decimal("rope.scaling.factor")}
    if kind == "yarn":
        scaling: dict[str, Any] = {
            "rope_type": "yarn",
            "factor": settings.decimal("rope.scaling.factor"),
            "original_max_position_embeddings": settings.integer("rope.scaling.original_context_length"),
        }
        for key in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{key}" in settings:
                scaling[key] = settings.decimal(f"rope.scaling.yarn_{key}")
        if settings.decimal("rope.scaling.attn_factor", 1.0) != 1.0:
            raise ValueError(f"{settings.path}: an attention factor of its own beside yarn is not supported")
        return scaling
    if kind == "longrope" and LONG_FACTORS in tensors and SHORT_FACTORS in tensors:
        return _longrope(settings, tensors)
    raise ValueError(
        f"{settings.path}: rope scaling {kind!r} is not supported, or its tensors are missing; supported: "
        f"{', '.join(SCALING_TYPES)}, and that of Llama 3"
    )


def _longrope(settings: GGUFSettings, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    original = settings.integer("rope.scaling.original_context_length", least=2)
    stretch = max(1.0, settings.integer("context_length") / original)
    derived = math.sqrt(1.0 + math.log(stretch) / math.log(original))
    factor = settings.decimal("rope.scaling.attn_factor", derived)
    if not math.isclose(factor, derived, rel_tol=1e-5):
        raise ValueError(
            f"{settings.path}: rope.scaling.attn_factor is {factor}, expected {derived} from the two context lengths"
        )
    return {
        "rope_type": "longrope",
        "long_factor": tensors[LONG_FACTORS].flatten().tolist(),
        "short_factor": tensors[SHORT_FACTORS].flatten().tolist(),
    }


def _llama3(settings: GGUFSettings, divisors: torch.Tensor, theta: float, rotated: int) -> dict[str, Any]:
    """The Hugging Face settings that give exactly these divisors. Raises ValueError if none are known."""
    factor = float(divisors.max())
    fits = tuple(divisors.shape) == (rotated // 2,)  # first: what a damaged file says may be too long to compute
    if not fits or not torch.allclose(
        divisors.double(), llama3_divisors(theta, rotated, factor), rtol=DIVISOR_TOLERANCE
    ):
        raise ValueError(
            f"{settings.path}: rope_freqs.weight is not the frequency scaling of Llama 3 (low_freq_factor 1, "
            "high_freq_factor 4, 8192 positions); convert the Hugging Face checkpoint of this model instead"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": LLAMA3_ORIGINAL_MAX_POSITION,
    }


def llama3_divisors(theta: float, rotated: int, factor: float) -> torch.Tensor:
    """`[rotated / 2]` fp64: what each rotary frequency is divided by under Llama 3's scaling."""
    frequency = theta ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    periods = LLAMA3_ORIGINAL_MAX_POSITION * frequency / (2 * math.pi)
    smooth = (periods - LLAMA3_LOW_FREQ_FACTOR) / (LLAMA3_HIGH_FREQ_FACTOR - LLAMA3_LOW_FREQ_FACTOR)
    smooth = smooth.clamp(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
