"""SyncPoint: where the partial sums of a row-parallel layer meet and join the residual stream."""

from __future__ import annotations

import torch

from megatron_lowbit.comm.all_reduce import AllReduce

# Shapes: L ranks living in this process, T tokens, H hidden features.


class SyncPoint:
    """One all-reduce of the model, named by module path (`layers.7.mlp.down_proj`)."""

    def __init__(self, name: str, all_reduce: AllReduce) -> None:
        self.name = name
        self._all_reduce = all_reduce

    def add(self, partial_LTH: torch.Tensor, residual_TH: torch.Tensor, bias_H: torch.Tensor | None) -> torch.Tensor:
        """The FP32 residual with the reduced sum added to it, in place: what arrives is decoded right into it.

        The bias comes after the wire and only once: summed on every rank it would count R times.
        """
        residual_TH = self._all_reduce(partial_LTH, residual_TH)
        return residual_TH if bias_H is None else residual_TH.add_(bias_H)
