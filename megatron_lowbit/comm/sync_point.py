"""SyncPoint: where the partial sums of a row-parallel layer meet and join the residual stream."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from megatron_lowbit.comm.all_reduce import AllReduce, PolicyAllReduce
from megatron_lowbit.comm.compensation import PostNorm

# Shapes: L ranks living in this process, T tokens, H hidden features.


class Norm(PostNorm, Protocol):
    """A norm that can be called, too: FP32 `[T, H]` to the same."""

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor: ...


@runtime_checkable
class JoiningAllReduce(Protocol):
    """A collective that uses more than the partial sums, and so joins the residual itself (see `join`)."""

    def join(
        self,
        partial_LTH: torch.Tensor,
        residual_TH: torch.Tensor,
        bias: torch.Tensor | None,
        block_input_TH: torch.Tensor,
        state: object,
        post_norm: Norm | None,
    ) -> torch.Tensor: ...


class SyncPoint:
    """One all-reduce of the model, named by module path (`layers.7.mlp.down_proj`).

    post_norm: applied to the whole sum before it joins the residual (Gemma 2).
    """

    def __init__(self, name: str, all_reduce: AllReduce | JoiningAllReduce, post_norm: Norm | None = None) -> None:
        self.name = name
        self._all_reduce = all_reduce
        self._post_norm = post_norm

    def add(
        self,
        partial_LTH: torch.Tensor,
        residual_TH: torch.Tensor,
        bias: torch.Tensor | None,
        block_input_TH: torch.Tensor,
        state: object,
    ) -> torch.Tensor:
        """The FP32 residual with the reduced sum added to it, in place.

        bias: None, `[H]` or `[T, H]`; it comes after the wire and only once: summed on every rank it would count R
        times. block_input_TH: the normed input of the block that ends here, the same on all ranks. state: what a
        scheme carries from one sync point to the next, made once a forward pass.
        """
        all_reduce = self._all_reduce
        if isinstance(all_reduce, PolicyAllReduce):
            all_reduce = all_reduce.choose(partial_LTH)
        if isinstance(all_reduce, JoiningAllReduce):
            return all_reduce.join(partial_LTH, residual_TH, bias, block_input_TH, state, self._post_norm)
        if self._post_norm is None:
            # what arrives is decoded right into the residual: a pass over memory less
            residual_TH = all_reduce(partial_LTH, residual_TH)
            return residual_TH if bias is None else residual_TH.add_(bias)
        return join_sum(all_reduce(partial_LTH, None), residual_TH, bias, self._post_norm)


def join_sum(
    full_TH: torch.Tensor, residual_TH: torch.Tensor, bias: torch.Tensor | None, post_norm: Norm | None
) -> torch.Tensor:
    """The residual with the whole sum, or its norm, added in place."""
    whole_TH = full_TH if bias is None else full_TH + bias
    return residual_TH.add_(whole_TH if post_norm is None else post_norm(whole_TH))
