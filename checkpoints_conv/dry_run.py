"""Dry run: what a conversion would write, from a config alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from checkpoints_conv.rank_files import RankSummary, rank_summary
from megatron_lowbit.checkpoint.manifest import MAX_TP
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.registry import tensor_sources


@dataclass(frozen=True)
class PlannedTensor:
    """What one rank's file holds of one tensor; full_shape is that of the whole."""

    rank: int
    name: str
    shape: tuple[int, ...]
    full_shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class DryRun:
    """parameters: of the model, each tensor counted once. ranks: as `convert` would report them, to the byte."""

    parameters: int
    ranks: tuple[RankSummary, ...]
    tensors: tuple[PlannedTensor, ...]


def dry_run(config: ModelConfig, tp: int, dtype: torch.dtype) -> DryRun:
    """The files that `convert` would write for `tp` ranks. Raises ValueError for a size or family it would refuse."""
    if not 1 <= tp <= MAX_TP:
        raise ValueError(f"tensor-parallel size is {tp}; it must lie between 1 and {MAX_TP}")
    sources = tensor_sources(config)
    tensors = []
    for rank in range(tp):
        for name, source in sources.items():
            shape = source.shard_shape(rank, tp)
            nbytes = math.prod(shape) * dtype.itemsize
            tensors.append(PlannedTensor(rank, name, shape, source.shape, nbytes))
    return DryRun(
        sum(math.prod(source.shape) for source in sources.values()),
        tuple(rank_summary(sources, rank, tp, dtype) for rank in range(tp)),
        tuple(tensors),
    )
