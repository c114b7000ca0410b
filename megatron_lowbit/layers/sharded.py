"""ShardedModule: a module whose parameters say which parts of which checkpoint tensors they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sharding import TensorSource


class ShardedModule(nn.Module):
    """Parameters are added with their sources; loader and tests read `sources`."""

    def __init__(self, context: ParallelContext) -> None:
        super().__init__()
        self.context = context
        self.sources: dict[str, tuple[TensorSource, ...]] = {}

    def add_parameter(self, name: str, dtype: torch.dtype, *sources: TensorSource) -> None:
        """A parameter for this rank's shards of `sources`, concatenated along dimension 0.

        It has no memory (`meta` device) until `assign_parameters` puts the loaded tensor in its place.
        """
        shapes = [source.shard_shape(*self.context.shard) for source in sources]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))
        self.sources[name] = sources


def sharded_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, tuple[TensorSource, ...]]]:
    """(full name, parameter, sources) of every parameter below `model`."""
    for prefix, module in model.named_modules():
        if isinstance(module, ShardedModule):
            for name, sources in module.sources.items():
                yield (f"{prefix}.{name}" if prefix else name), getattr(module, name), sources


def assign_parameters(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Makes every parameter of `model` the tensor of its name; tensors may be shared between models."""
    expected = {name: parameter for name, parameter, _ in sharded_parameters(model)}
    assert set(expected) == set(tensors)
    for name, tensor in tensors.items():
        assert tensor.shape == expected[name].shape and tensor.dtype == expected[name].dtype, name
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
