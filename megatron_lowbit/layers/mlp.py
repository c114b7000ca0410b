"""SwiGLU feed-forward block: column-parallel gate and up in one product, row-parallel down."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lowbit.comm.sync_point import SyncPoint
from megatron_lowbit.layers.linear import MergedColumnParallelLinear, RowParallelLinear, Tensors
from megatron_lowbit.parallel import ParallelContext

# Shapes: T tokens, H hidden features, F feed-forward features (F' this rank's part).


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, added to the residual."""

    def __init__(
        self, context: ParallelContext, tensors: Tensors, prefix: str, dtype: torch.dtype, sync_point: SyncPoint
    ) -> None:
        super().__init__()
        names = (f"{prefix}.gate_proj", f"{prefix}.up_proj")
        self.gate_up_proj = MergedColumnParallelLinear(context, tensors, names, dtype)
        self.down_proj = RowParallelLinear(context, tensors, f"{prefix}.down_proj", dtype, sync_point)

    def forward(self, x_TH: torch.Tensor, residual_TH: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = self.gate_up_proj(x_TH)
        return self.down_proj(F.silu(gate_TF) * up_TF, residual_TH)
