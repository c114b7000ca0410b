"""SyncPoint: where the partial sums of a row-parallel layer meet and join the residual stream."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_lowbit.comm.all_reduce import AllReduce

# Shapes: L ranks living in this process, T tokens, H hidden features.


class SyncPoint:
    """One all-reduce of the model, named by module path (`layers.7.mlp.down_proj`).

    post_norm: FP32 `[T, H]` to the same, applied to the whole sum before it joins the residual (Gemma 2).
    """

    def __init__(
        self, name: str, all_reduce: AllReduce, post_norm: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
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
        scheme carries from one sync point to the next, made once a forward pass. This sync point needs neither.
        """
        if self._post_norm is None:
            # what arrives is decoded right into the residual: a pass over memory less
            residual_TH = self._all_reduce(partial_LTH, residual_TH)
            return residual_TH if bias is None else residual_TH.add_(bias)
        full_TH = self._all_reduce(partial_LTH, None)
        return residual_TH.add_(self._post_norm(full_TH if bias is None else full_TH + bias))
