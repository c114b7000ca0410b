"""Rotary position embedding in the half-split layout of Hugging Face checkpoints, with the known ways to stretch it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_lowbit.config import ModelConfig, RopeScaling
from megatron_lowbit.layers.kv_cache import TokenBatch

# Shapes: T tokens, B sequences, E tokens of the longest sequence so far, N heads, D features of a head, P rotated pairs
# of them.

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


@dataclass(frozen=True)
class RotaryTables:
    """FP32 (cos, sin) of one forward pass.

    tokens: of the new tokens, `[T, 1, 2P]`. keys: None where keys are rotated when they are made. Where a sequence that
    grows changes the frequencies of all its positions (longrope), caches hold unrotated keys, and these are the tables
    of every position: `[B, 1, E, 2P]`.
    """

    tokens: Tables
    keys: Tables | None = None

    def between(self, first: int, end: int, row: int | slice = slice(None)) -> Tables:
        """`[B, 1, end - first, 2P]` for keys of all sequences, or without the first dimension for those of one."""
        assert self.keys is not None
        cos, sin = self.keys
        return cos[row, :, first:end], sin[row, :, first:end]


class Rotary:
    """Tables for the positions of one forward pass, shared by all layers that rotate alike."""

    def __init__(self, config: ModelConfig, device: torch.device, local: bool = False) -> None:
        scaling = None if local and config.rope_local_theta is not None else config.rope_scaling
        self._short = inverse_frequencies(config, local).to(device)
        self._factor = attention_factor(scaling)
        self._long: torch.Tensor | None = None
        if scaling is not None and scaling.kind == "longrope":
            self._long = inverse_frequencies(config, local, long=True).to(device)
            self._original = scaling.original_max_position

    def tables(self, batch: TokenBatch) -> RotaryTables:
        if self._long is None:
            return RotaryTables(self._of_angles(torch.outer(batch.positions_T.float(), self._short).unsqueeze(1)))
        device = self._short.device
        ends = [start + length for start, length in zip(batch.starts, batch.lengths, strict=True)]
        is_long_B1 = torch.tensor([[end > self._original] for end in ends], device=device)
        frequencies_BP = torch.where(is_long_B1, self._long, self._short)
        positions_E = torch.arange(max(ends, default=0), device=device).float()
        keys = self._of_angles((positions_E[:, None] * frequencies_BP[:, None, :]).unsqueeze(1))
        rows_T = torch.repeat_interleave(torch.tensor(batch.lengths, device=device))
        cos, sin = (table[rows_T, :, batch.positions_T] for table in keys)
        return RotaryTables((cos, sin), keys)

    def _of_angles(self, angles: torch.Tensor) -> Tables:
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self._factor == 1.0 else (cos * self._factor, sin * self._factor)


def rotate(x: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Rotates the pairs (d, d + P) of the leading 2P features in FP32; returns the dtype of `x`.

    x: `[T, N, D]`, or `[..., N, E, D]` with tables of keys.
    """
    cos, sin = tables
    turned, passed = x.float().split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    # product and sum apart, as transformers computes it: at one rank our FP32 logits equal its logits bit for bit
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return (turned if passed.shape[-1] == 0 else torch.cat((turned, passed), dim=-1)).to(x.dtype)
