"""AllReduce: the protocol every collective follows, and the choice of one for a scheme, made when a model is built."""

from __future__ import annotations

from typing import Protocol

import torch

from lowbit_kernels import get_backend
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.constants import SyncPointConstants
from megatron_lowbit.comm.one_stage import OneStageAllReduce
from megatron_lowbit.comm.saturation import SaturationCounter
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.comm.two_stage import TwoStageAllReduce
from megatron_lowbit.comm.virtual import VirtualAllReduce
from megatron_lowbit.comm.wire_format import WireFormat
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
    name: str = "",
    saturation: SaturationCounter | None = None,
) -> AllReduce:
    """The collective of `scheme` for messages of `hidden` features.

    constants: index sets and scales of this sync point, `NO_CONSTANTS` for schemes that need none. name: of the sync
    point, for errors. saturation: counts what the codecs of both stages encode.
    """
    if context.size == 1:
        return SingleRankAllReduce()
    kernels = get_backend(backend, context.device)

    def codec(wire: WireFormat, scale_RD: torch.Tensor | None) -> Codec:
        return Codec(wire, hidden, kernels, constants.body_index, constants.outlier_index, scale_RD, saturation)

    reduce_codec = codec(scheme.reduce_stage, constants.reduce_scale_RD)
    gather_codec = None
    if scheme.gather_stage is not None:
        gather_codec = codec(scheme.gather_stage, constants.gather_scale_1D)
    if context.virtual:
        return VirtualAllReduce(reduce_codec, gather_codec, context.traffic)
    if gather_codec is None:
        return OneStageAllReduce(context, reduce_codec, name)
    return TwoStageAllReduce(context, reduce_codec, gather_codec, name)
