"""ShardRule: which part of a full tensor a tensor-parallel rank holds. Data, read by loader and converter."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


def cut_evenly(count: int, size: int) -> list[tuple[int, int]]:
    """Cuts `range(count)` into `size` contiguous [start, stop) parts, the first `count % size` one longer.

    Any count and any size: parts may be empty when there are more parts than things.
    """
    base, extra = divmod(count, size)
    bounds = [0]
    for part in range(size):
        bounds.append(bounds[-1] + base + (1 if part < extra else 0))
    return list(itertools.pairwise(bounds))


@dataclass(frozen=True)
class ShardRule:
    """Cuts dimension `dim` of a full tensor among the ranks; `dim=None` means every rank holds the whole tensor.

    `units` things (heads, features, vocabulary entries) are dealt evenly and contiguously. Every `units_per_block`
    neighbouring units share one block of `block` rows of the tensor; a rank holds each block that any of its units
    needs. So query heads are `units=num_heads, block=head_dim`; key-value heads are
    `units=num_heads, units_per_block=heads_per_kv_head, block=head_dim`, and a block whose query heads are dealt to
    two ranks is held by both. A rank without units holds nothing.
    """

    dim: int | None = None
    units: int = 0
    units_per_block: int = 1
    block: int = 1

    def extent(self) -> int:
        """Length of the full tensor along `dim`."""
        return self.units // self.units_per_block * self.block

    def span(self, rank: int, size: int) -> tuple[int, int]:
        """[start, stop) along `dim` that `rank` of `size` holds. Only for a rule with a `dim`."""
        assert self.dim is not None
        start, stop = cut_evenly(self.units, size)[rank]
        if start == stop:
            return (0, 0)
        first_block = start // self.units_per_block
        last_block = (stop - 1) // self.units_per_block
        return (first_block * self.block, (last_block + 1) * self.block)


REPLICATED = ShardRule()


@dataclass(frozen=True)
class TensorSource:
    """One checkpoint tensor behind (part of) a parameter.

    A merged parameter (QKV, gate and up) lists several sources; their shards are concatenated along dimension 0 in
    that order.
    """

    name: str
    shape: tuple[int, ...]
    rule: ShardRule = REPLICATED

    def __post_init__(self) -> None:
        if self.rule.dim is not None:
            assert self.shape[self.rule.dim] == self.rule.extent(), (self.name, self.shape, self.rule)

    def shard_shape(self, rank: int, size: int) -> tuple[int, ...]:
        if self.rule.dim is None:
            return self.shape
        start, stop = self.rule.span(rank, size)
        return tuple(stop - start if axis == self.rule.dim else extent for axis, extent in enumerate(self.shape))
