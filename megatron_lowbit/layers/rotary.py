"""Rotary position embedding in the half-split layout of Hugging Face checkpoints, with Llama-3's scaling."""

from __future__ import annotations

import math

import torch

from megatron_lowbit.config import ModelConfig, RopeScaling

# Shapes: T tokens, N heads, D features of a head.


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """FP32 `[D/2]` angular frequencies."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies if config.rope_scaling is None else _scaled(frequencies, config.rope_scaling)


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    wavelengths = 2 * math.pi / frequencies
    longest_kept = scaling.original_max_position / scaling.high_freq_factor
    shortest_stretched = scaling.original_max_position / scaling.low_freq_factor
    share = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - share) * frequencies / scaling.factor + share * frequencies
    stretched = torch.where(wavelengths > shortest_stretched, frequencies / scaling.factor, between)
    return torch.where(wavelengths < longest_kept, frequencies, stretched)


class Rotary:
    """Cosine and sine tables for the positions of one forward pass, shared by all layers."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(config).to(device)

    def tables(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """FP32 (cos, sin), each `[T, 1, D]`."""
        angles = torch.outer(positions_T.float(), self._frequencies)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return angles.cos(), angles.sin()


def rotate(x_TND: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotates the pairs (d, d + D/2) in FP32; returns the dtype of `x_TND`."""
    cos, sin = tables
    x = x_TND.float()
    first, second = x.chunk(2, dim=-1)
    # product and sum apart, as transformers computes it: at one rank our FP32 logits equal its logits bit for bit
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x_TND.dtype)
