"""AllReduce: the protocol every collective follows, and the choice of one for a scheme, made when a model is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from lowbit_kernels import get_backend
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.compensation import RMS_NBYTES, CompensatedAllReduce, Mover
from megatron_lowbit.comm.constants import SyncPointConstants
from megatron_lowbit.comm.exchange import AUTOMATIC, TwoStageExchange
from megatron_lowbit.comm.one_stage import OneStageAllReduce
from megatron_lowbit.comm.policy import Choice, Policy, PolicyLog
from megatron_lowbit.comm.rotated_codec import make_codec
from megatron_lowbit.comm.saturation import SaturationCounter
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.comm.symmetric import SymmetricAllReduce, SymmetricBuffers, SymmetricUpToSize, unserved
from megatron_lowbit.comm.two_stage import TwoStageAllReduce
from megatron_lowbit.comm.virtual import VirtualAllReduce, VirtualExchange
from megatron_lowbit.comm.wire_format import WireFormat
from megatron_lowbit.comm.workspace import Workspace
from megatron_lowbit.parallel import ParallelContext


class AllReduce(Protocol):
    """Sums the partials of all tensor-parallel ranks.

    `partial_LTH [L, T, H] {U_tp}`: the partial sums of the L ranks that live in this process (one, or all when ranks
    are virtual), bf16 or fp32. Returns `full_TH` in FP32, bit-identical on every rank; where the FP32 `add_to_TH` is
    given, the sum is added to it in place instead, and it is returned.
    """

    def __call__(self, partial_LTH: torch.Tensor, add_to_TH: torch.Tensor | None = None) -> torch.Tensor: ...


class SingleRankAllReduce:
    """One rank has nothing to exchange: the partial is the sum, and no scheme touches it."""

    def __call__(self, partial_LTH: torch.Tensor, add_to_TH: torch.Tensor | None = None) -> torch.Tensor:
        (partial_TH,) = partial_LTH
        return partial_TH.float() if add_to_TH is None else add_to_TH.add_(partial_TH)


class PolicyAllReduce:
    """Takes the collective that a policy names for the size of each message."""

    def __init__(
        self, policy: Policy, collectives: Mapping[Choice, AllReduce | CompensatedAllReduce], log: PolicyLog
    ) -> None:
        self._policy = policy
        self._collectives = collectives
        self._log = log

    def choose(self, partial_LTH: torch.Tensor) -> AllReduce | CompensatedAllReduce:
        """The collective for this message; counted."""
        tokens, hidden = partial_LTH.shape[1:]
        choice = self._policy.choose(tokens, hidden)
        self._log.add(choice, tokens, hidden)
        return self._collectives[choice]

    def __call__(self, partial_LTH: torch.Tensor, add_to_TH: torch.Tensor | None = None) -> torch.Tensor:
        """For collectives that need the partial sums alone."""
        chosen = self.choose(partial_LTH)
        assert not isinstance(chosen, CompensatedAllReduce), "it needs a sync point"
        return chosen(partial_LTH, add_to_TH)


def build_all_reduce(
    context: ParallelContext,
    scheme: CommScheme,
    hidden: int,
    constants: SyncPointConstants,
    backend: str = "auto",
    name: str = "",
    saturation: SaturationCounter | None = None,
    policy: Policy | None = None,
    policy_log: PolicyLog | None = None,
    workspace: Workspace | None = None,
    dtype: torch.dtype = torch.bfloat16,
    piece_nbytes: int = AUTOMATIC,
    symmetric: SymmetricBuffers | None = None,
    post_norm: bool = False,
) -> AllReduce | CompensatedAllReduce:
    """The collective of `scheme` for messages of `hidden` features.

    constants: index sets and scales of this sync point, `NO_CONSTANTS` for schemes that need none. name: of the sync
    point, for errors. saturation: counts what the codecs of both stages encode. policy: chooses by message size between
    the two-stage scheme, its one-stage form and the exact partials (of `dtype`); None: the scheme as it stands.
    workspace: buffers shared with other sync points. piece_nbytes: of two stages without a policy. symmetric: memory
    that the ranks' GPUs share; two-stage messages that fit go through it, but for those it does not serve, rotated and
    trellis-coded ones, and where saturation is counted. post_norm: a norm stands between this sum and the residual.
    """
    if context.size == 1:
        return SingleRankAllReduce()
    kernels = get_backend(backend, context.device)
    workspace = Workspace() if workspace is None else workspace

    def codec(
        wire: WireFormat,
        scale_RD: torch.Tensor | None,
        minimum_RD: torch.Tensor | None = None,
        counter: SaturationCounter | None = saturation,
    ) -> Codec:
        index = constants.body_index, constants.outlier_index
        return make_codec(wire, hidden, kernels, *index, scale_RD, counter, minimum_RD)

    reduce_codec = codec(scheme.reduce_stage, constants.reduce_scale_RD, constants.reduce_minimum_RD)
    gather_codec = None
    if scheme.gather_stage is not None:
        counter = saturation if saturation is None or saturation.gather is None else saturation.gather
        gather_codec = codec(scheme.gather_stage, constants.gather_scale_1D, constants.gather_minimum_1D, counter)

    def compensated(reduce_codec: Codec, gather_codec: Codec, piece_nbytes: int) -> CompensatedAllReduce:
        reduce_nbytes = reduce_codec.layout.row_nbytes
        gather_nbytes = gather_codec.layout.row_nbytes + (RMS_NBYTES if post_norm else 0)
        mover: Mover
        if context.virtual:
            mover = VirtualExchange(reduce_nbytes, gather_nbytes, context.traffic)
        else:
            # a token must have the same owner at all sync points, whose formats may differ: the width alone decides
            mover = TwoStageExchange(context, reduce_nbytes, gather_nbytes, name, piece_nbytes, workspace, hidden // 2)
        predictor = None if constants.predictor is None else constants.predictor.to(context.device)
        return CompensatedAllReduce(
            mover, reduce_codec, gather_codec, list(context.local_ranks), predictor, scheme.loop, constants.limits
        )

    def collective(
        reduce_codec: Codec, gather_codec: Codec | None, piece_nbytes: int
    ) -> AllReduce | CompensatedAllReduce:
        if not scheme.portable and gather_codec is not None:
            return compensated(reduce_codec, gather_codec, piece_nbytes)
        if context.virtual:
            return VirtualAllReduce(reduce_codec, gather_codec, context.traffic)
        if gather_codec is None:
            return OneStageAllReduce(context, reduce_codec, name, workspace)
        messages = TwoStageAllReduce(context, reduce_codec, gather_codec, name, piece_nbytes, workspace)
        if symmetric is None or saturation is not None or unserved(scheme):
            return messages
        return SymmetricUpToSize(
            SymmetricAllReduce(context, scheme, hidden, constants, symmetric, name), beyond=messages
        )

    if policy is None or gather_codec is None:
        return collective(reduce_codec, gather_codec, piece_nbytes)
    exact_codec = codec(WireFormat(8 * dtype.itemsize), None)
    collectives: dict[Choice, AllReduce | CompensatedAllReduce] = {}
    for _, choice in policy.steps:
        first = exact_codec if choice.collective == "exact" else reduce_codec
        two_stages = choice.collective == "two-stage" or not (scheme.portable or choice.collective == "exact")
        second = gather_codec if two_stages else None
        collectives[choice] = collective(first, second, choice.piece_nbytes)
    return PolicyAllReduce(policy, collectives, PolicyLog() if policy_log is None else policy_log)
