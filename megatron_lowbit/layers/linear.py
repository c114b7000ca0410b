"""Tensor-parallel linear layers: column-parallel ones split outputs, the row-parallel one splits inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from megatron_lowbit.comm.sync_point import SyncPoint
from megatron_lowbit.layers.sharded import ShardedModule
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sharding import TensorSource

# Shapes: T tokens, H hidden features, F features cut over ranks (F' this process's part), L ranks in this process.
# Virtual ranks share one full copy: their columns stay together, only row-parallel layers tell them apart.

Tensors = Mapping[str, TensorSource]


class ColumnParallelLinear(ShardedModule):
    """`y_TF' = x_TH W'^T + b'`: each rank computes its own output features; nothing is exchanged.

    `names` are checkpoint tensors without the `.weight` ending; several are merged into one product.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, context: ParallelContext, tensors: Tensors, names: tuple[str, ...], dtype: torch.dtype) -> None:
        super().__init__(context)
        self.add_parameter("weight", dtype, *(tensors[name + ".weight"] for name in names))
        if names[0] + ".bias" in tensors:
            self.add_parameter("bias", dtype, *(tensors[name + ".bias"] for name in names))
        else:
            self.bias = None
        shard = context.shard
        self.split_sizes = [tensors[name + ".weight"].shard_shape(*shard)[0] for name in names]

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TH, self.weight, self.bias)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel layers of the same input in one product; returns one tensor for each."""

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return super().forward(x_TH).split(self.split_sizes, dim=-1)


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value projections. A key-value head shared by query heads of two ranks is held by both."""

    def __init__(self, context: ParallelContext, tensors: Tensors, prefix: str, dtype: torch.dtype) -> None:
        names = tuple(f"{prefix}.{kind}_proj" for kind in "qkv")
        super().__init__(context, tensors, names, dtype)


class RowParallelLinear(ShardedModule):
    """`residual + sum over ranks of x'_TF' W'^T + b`: partial sums meet at the layer's sync point (Megatron's g).

    The bias is whole on every rank and is added once, after the reduction.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, context: ParallelContext, tensors: Tensors, name: str, dtype: torch.dtype, sync_point: SyncPoint
    ) -> None:
        super().__init__(context)
        weight = tensors[name + ".weight"]
        self.add_parameter("weight", dtype, weight)
        if name + ".bias" in tensors:
            self.add_parameter("bias", torch.float32, tensors[name + ".bias"])
        else:
            self.bias = None
        self.sync_point = sync_point
        if context.virtual:
            self._spans = [weight.rule.span(rank, context.size) for rank in context.local_ranks]
        else:
            self._spans = [(0, self.weight.shape[1])]

    def partial(self, x_TF: torch.Tensor) -> torch.Tensor:
        """`partial_LTH {U_tp}`: the product over each local rank's part of the features, not yet summed."""
        if len(self._spans) == 1:
            return F.linear(x_TF, self.weight).unsqueeze(0)
        out = x_TF.new_empty(len(self._spans), x_TF.shape[0], self.weight.shape[0])
        for row, (start, stop) in enumerate(self._spans):
            torch.mm(x_TF[:, start:stop], self.weight[:, start:stop].t(), out=out[row])
        return out

    def forward(
        self, x_TF: torch.Tensor, residual_TH: torch.Tensor, block_input_TH: torch.Tensor, state: object
    ) -> torch.Tensor:
        """FP32 residual `[T, H]` with this layer's output added; the last two are for its sync point."""
        return self.sync_point.add(self.partial(x_TF), residual_TH, self.bias, block_input_TH, state)
