"""Gated feed-forward block: column-parallel gate and up in one product, row-parallel down."""

from __future__ import annotations

import torch
from torch import nn

from megatron_lowbit.comm.sync_point import SyncPoint
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.layers.activation import gate_of
from megatron_lowbit.layers.linear import MergedColumnParallelLinear, RowParallelLinear, Tensors
from megatron_lowbit.parallel import ParallelContext

# Shapes: T tokens, H hidden features, F feed-forward features (F' this rank's part).


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`, added to the residual."""

    def __init__(
        self, context: ParallelContext, config: ModelConfig, tensors: Tensors, prefix: str, dtype: torch.dtype,
        sync_point: SyncPoint,
    ) -> None:  # fmt: skip
        super().__init__()
        names = (f"{prefix}.gate_proj", f"{prefix}.up_proj")
        self.gate_up_proj = MergedColumnParallelLinear(context, tensors, names, dtype)
        self.down_proj = RowParallelLinear(context, tensors, f"{prefix}.down_proj", dtype, sync_point)
        self.gate = gate_of(config.activation)

    def forward(self, x_TH: torch.Tensor, residual_TH: torch.Tensor, state: object) -> torch.Tensor:
        """FP32 residual `[T, H]` with the block's output added."""
        gate_TF, up_TF = self.gate_up_proj(x_TH)
        return self.down_proj(self.gate(gate_TF, up_TF), residual_TH, x_TH, state)
