"""Random weights of any model, made shard by shard: no rank ever holds the whole model, and all hold parts of one."""

from __future__ import annotations

import hashlib

import torch

from megatron_lowbit.comm.all_reduce import SingleRankAllReduce
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.layers.sharded import sharded_parameters
from megatron_lowbit.models.decoder import Decoder
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sharding import TensorSource
from megatron_lowbit.weights import ModelWeights

# Shapes: O rows of a whole tensor, I its columns, P values of the pool.

_POOL = 1 << 22


def random_weights(config: ModelConfig, context: ParallelContext, dtype: torch.dtype, seed: int = 0) -> ModelWeights:
    """Weights whose activations stay finite, for timing: what a layer costs does not depend on its values.

    Row o of a tensor is a stretch of one pool of normal numbers, beginning where the tensor's name, o and `seed` say.
    So a shard costs a copy, and is the same part of the same model at any tensor-parallel size.
    """
    pools = _Pools(seed)
    skeleton = Decoder(context, config, dtype, lambda name: SingleRankAllReduce())
    tensors = {}
    for name, parameter, sources in sharded_parameters(skeleton):
        shards = [_shard(source, context, pools) for source in sources]
        tensors[name] = torch.cat(shards).to(device=context.device, dtype=parameter.dtype)
        assert tensors[name].shape == parameter.shape, name
    return ModelWeights(config, context, dtype, f"random, seed {seed}", tensors)


class _Pools:
    """Normal numbers in bf16, scaled for the width of a row so that products keep unit variance."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._normal_P = torch.randn(_POOL, generator=torch.Generator().manual_seed(seed))
        self._scaled: dict[int, torch.Tensor] = {}

    def of_width(self, width: int) -> torch.Tensor:
        if width not in self._scaled:
            self._scaled[width] = (self._normal_P / width**0.5).bfloat16()
        return self._scaled[width]


def _shard(source: TensorSource, context: ParallelContext, pools: _Pools) -> torch.Tensor:
    """This rank's part of one checkpoint tensor, bf16: the norms' weights are 1, biases 0."""
    shape = source.shard_shape(*context.shard)
    if len(source.shape) == 1:
        return torch.full(shape, 1.0 if source.name.endswith("norm.weight") else 0.0)
    rows, width = source.shape
    first, last = (0, 0) if source.rule.dim is None else source.rule.span(*context.shard)
    row_span = (first, last) if source.rule.dim == 0 else (0, rows)
    shift = first if source.rule.dim == 1 else 0
    digest = hashlib.sha256(f"{pools.seed}:{source.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    if width >= _POOL:
        raise ValueError(f"{source.name} is {width} wide; random weights are made for widths below {_POOL}")
    starts_O = torch.randint(0, _POOL - width, (rows,), generator=generator)[slice(*row_span)] + shift
    scaled_P = pools.of_width(width)
    return scaled_P.unfold(0, shape[1], 1).index_select(0, starts_O) if shape[1] else scaled_P.new_empty(shape)
