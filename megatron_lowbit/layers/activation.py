"""Gated activations of feed-forward blocks, by the names that ModelConfig knows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

# Shapes: T tokens, F feed-forward features.

#: (gate_TF, up_TF) -> the input of the down projection, `[T, F]`.
Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

#: Constants of gpt-oss.
SWIGLU_LIMIT = 7.0
SWIGLU_ALPHA = 1.702


def gate_of(activation: str) -> Gate:
    """The function of one of `megatron_lowbit.config.ACTIVATIONS`."""
    gates: dict[str, Gate] = {
        "gelu": lambda gate, up: F.gelu(gate) * up,
        "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        "silu": lambda gate, up: F.silu(gate) * up,
        "swiglu_clamped": swiglu_clamped,
    }
    return gates[activation]


def swiglu_clamped(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """`(up + 1) * gate * sigmoid(1.702 gate)` with gate at most 7 and up within 7 of 0 (gpt-oss)."""
    gate_TF = gate_TF.clamp(max=SWIGLU_LIMIT)
    up_TF = up_TF.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (up_TF + 1) * (gate_TF * torch.sigmoid(gate_TF * SWIGLU_ALPHA))
