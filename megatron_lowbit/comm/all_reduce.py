"""AllReduce: the protocol every collective follows, and the choice of one for a scheme, made when a model is built."""

from __future__ import annotations

from typing import Protocol

import torch

from lowbit_kernels import get_backend
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.constants import SyncPointConstants
from megatron_lowbit.comm.one_stage import OneStageAllReduce
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.comm.two_stage import TwoStageAllReduce
from megatron_lowbit.comm.virtual import VirtualAllReduce
from megatron_lowbit.parallel import ParallelContext


class AllReduce(Protocol):
    """Sums the partials of all tensor-parallel ranks.

    `partial_LTH [L, T, H] {U_tp}`: the partial sums of the L ranks that live in this process (one, or all when ranks
    are virtual), bf16 or fp32. Returns `full_TH` in FP32, bit-identical on every rank.
    """

    def __call__(self, partial_LTH: torch.Tensor) -> torch.Tensor: ...


class SingleRankAllReduce:
    """One rank has nothing to exchange: the partial is the sum, and no scheme touches it."""

    def __call__(self, partial_LTH: torch.Tensor) -> torch.Tensor:
        (partial_TH,) = partial_LTH
        return partial_TH.float()


def build_all_reduce(
    context: ParallelContext,
    scheme: CommScheme,
    hidden: int,
    constants: SyncPointConstants,
    backend: str = "auto",
) -> AllReduce:
    """The collective of `scheme` for messages of `hidden` features.

    constants: index sets and scales of this sync point, `NO_CONSTANTS` for schemes that need none.
    """
    if context.size == 1:
        return SingleRankAllReduce()
    kernels = get_backend(backend, context.device)
    reduce_codec = Codec(
        scheme.reduce_stage, hidden, kernels, constants.body_index, constants.outlier_index, constants.reduce_scale_RD
    )
    gather_codec = None
    if scheme.gather_stage is not None:
        gather_codec = Codec(
            scheme.gather_stage, hidden, kernels, constants.body_index, constants.outlier_index,
            constants.gather_scale_1D,
        )  # fmt: skip
    if context.virtual:
        return VirtualAllReduce(reduce_codec, gather_codec, context.traffic)
    if gather_codec is None:
        return OneStageAllReduce(context, reduce_codec)
    return TwoStageAllReduce(context, reduce_codec, gather_codec)
