"""Rotary position embedding in the half-split layout of Hugging Face checkpoints, with the known ways to stretch it."""

from __future__ import annotations

import math

import torch

from megatron_lowbit.config import ModelConfig, RopeScaling
from megatron_lowbit.layers.kv_cache import TokenBatch

# Shapes: T tokens, B sequences, N heads, D features of a head, P rotated pairs of them.

Tables = tuple[torch.Tensor, torch.Tensor]


def inverse_frequencies(config: ModelConfig, local: bool = False, long: bool = False) -> torch.Tensor:
    """FP32 `[P]` angular frequencies.

    local: of layers with a sliding window, where those have their own. long: of a sequence beyond the original
    context, where that makes a difference (longrope).
    """
    width = config.rotary_dim or config.head_dim
    local = local and config.rope_local_theta is not None
    theta = config.rope_local_theta if local and config.rope_local_theta is not None else config.rope_theta
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    scaling = None if local else config.rope_scaling
    if scaling is None:
        return 1.0 / theta**exponents
    if scaling.kind == "longrope":
        return 1.0 / (torch.tensor(scaling.long_factors if long else scaling.short_factors) * theta**exponents)
    if scaling.kind == "yarn":
        return _yarn(theta**exponents, scaling, theta, width)
    frequencies = 1.0 / theta**exponents
    return frequencies / scaling.factor if scaling.kind == "linear" else _llama3(frequencies, scaling)


def _llama3(frequencies_P: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    wavelengths = 2 * math.pi / frequencies_P
    longest_kept = scaling.original_max_position / scaling.high_freq_factor
    shortest_stretched = scaling.original_max_position / scaling.low_freq_factor
    share = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - share) * frequencies_P / scaling.factor + share * frequencies_P
    stretched = torch.where(wavelengths > shortest_stretched, frequencies_P / scaling.factor, between)
    return torch.where(wavelengths < longest_kept, frequencies_P, stretched)


def _yarn(periods_P: torch.Tensor, scaling: RopeScaling, theta: float, width: int) -> torch.Tensor:
    """Kept where a feature turns more than `beta_fast` times over the original context, divided by `factor` below
    `beta_slow`, and a ramp over the features between (arXiv 2309.00071, section 3.2)."""

    def feature_that_turns(times: float) -> float:
        return width * math.log(scaling.original_max_position / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = feature_that_turns(scaling.beta_fast), feature_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001
    stretched_P = ((torch.arange(width // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return 1.0 / (scaling.factor * periods_P) * stretched_P + 1.0 / periods_P * (1 - stretched_P)


def attention_factor(scaling: RopeScaling | None) -> float:
    """Factor on cosines and sines: the given one, or what the kind of scaling makes of its `factor`."""
    if scaling is None:
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1.0:
        return 1.0
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1.0
    if scaling.kind == "longrope":
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_position))
    return 1.0


class Rotary:
    """Cosines and sines of the positions of one forward pass, shared by all layers that rotate alike."""

    def __init__(self, config: ModelConfig, device: torch.device, local: bool = False) -> None:
        scaling = None if local and config.rope_local_theta is not None else config.rope_scaling
        self._frequencies = inverse_frequencies(config, local).to(device)
        self._factor = attention_factor(scaling)
        self._long: torch.Tensor | None = None
        if scaling is not None and scaling.kind == "longrope":
            self._long = inverse_frequencies(config, local, long=True).to(device)
            self._original = scaling.original_max_position

    def tables(self, batch: TokenBatch, capacity: int | None = None) -> Tables:
        """FP32 (cos, sin), each `[T, 1, 2P]`; capacity: of the cache that the keys go into, None without one."""
        angles_TP = batch.positions_T.float()[:, None] * self._chosen(batch, capacity)
        angles = torch.cat((angles_TP, angles_TP), dim=-1).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self._factor == 1.0 else (cos * self._factor, sin * self._factor)

    def _chosen(self, batch: TokenBatch, capacity: int | None) -> torch.Tensor:
        """Frequencies `[P]`, or `[T, P]` where they differ by sequence.

        Long ones are for sequences beyond the original context. What is cached cannot change over when a sequence
        grows, in deeper layers least of all, so a cache decides by what it could hold. (transformers decides anew with
        every pass, and throws its cache away at the border.)
        """
        if self._long is None:
            return self._frequencies
        if capacity is not None:
            return self._long if capacity > self._original else self._frequencies
        ends = [start + length for start, length in zip(batch.starts, batch.lengths, strict=True)]
        device = self._frequencies.device
        is_long_B = torch.tensor([end > self._original for end in ends], device=device)
        is_long_T = is_long_B.repeat_interleave(torch.tensor(batch.lengths, device=device))
        return torch.where(is_long_T[:, None], self._long, self._frequencies)


def rotate(x_TND: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Rotates the pairs (d, d + P) of the leading 2P features in FP32; returns the dtype of `x_TND`."""
    cos, sin = tables
    width = cos.shape[-1]
    x = x_TND.float()
    turned = x[..., :width]
    first, second = turned.chunk(2, dim=-1)
    # product and sum apart, as transformers computes it: at one rank our FP32 logits equal its logits bit for bit
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return (turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)).to(x_TND.dtype)
