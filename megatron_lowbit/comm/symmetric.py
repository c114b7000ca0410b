"""Two-stage all-reduce between GPUs that can address each other: three kernels, no message and no host in between.

The first kernel encodes this rank's partials straight into the buffers of the tokens' owners, the second one sums and
re-encodes what this rank owns and hands it to all, the third one decodes. They wait for each other on the device, so a
CUDA graph can hold them. The bits are those of `TwoStageAllReduce`; `lowbit_kernels.symmetric` has the kernels.

When not to use it: for messages beyond the reserved size, across hosts, for formats that are rotated or trellis-coded,
or where something wants to see the sums in between (`SaturationCounter`).
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace

import torch

from megatron_lowbit.comm.constants import SyncPointConstants
from megatron_lowbit.comm.exchange import GATHER, REDUCE
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.comm.two_stage import TwoStageAllReduce
from megatron_lowbit.parallel import CommunicationError, ParallelContext
from megatron_lowbit.sharding import cut_evenly
from megatron_lowbit.transport import symmetric_memory
from megatron_lowbit.transport.base import TrafficCounter, ranks_text

# Shapes: L ranks living in this process (1), R ranks, T tokens, H hidden features, D body features.

DEFAULT_TIMEOUT_S = 30.0
#: Tokens that a model's buffers are reserved for: prompts of usual length; longer messages go as messages.
RESERVED_TOKENS = 2048

logger = logging.getLogger(__name__)


def why_missing(context: ParallelContext, share_gpus: bool = False) -> str:
    """An empty string where the ranks of `context` can use symmetric memory, else the reason. A collective call.

    share_gpus: several ranks on one GPU will do (for tests), see `symmetric_memory.why_missing`.
    """
    if context.virtual or context.size == 1:
        return "all ranks are in one process"
    control = _control(context)
    for rank, problem in enumerate(control.all_gather_json(_local_problem(context))):
        if problem:
            return f"rank {rank}: {problem}"
    return symmetric_memory.why_missing(context.device, context.group, control.all_gather_json, share_gpus)


class SymmetricBuffers:
    """One rank's end of its group's buffers. Made once; all sync points share it, one after the other on one stream.

    tokens, row_nbytes: the largest message, and its widest packet row. timeout_s: how long a kernel waits for another
    rank before all of them give up: results are NaN from then on, and the next call or `check` raises.
    A collective call. Raises RankError where a rank cannot map the memory; ask `why_missing` first.
    """

    def __init__(
        self, context: ParallelContext, tokens: int, row_nbytes: int, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        from lowbit_kernels import symmetric_endpoint  # it imports Triton

        self._context = context
        self._timeout_s = timeout_s
        region_nbytes = symmetric_endpoint.region_nbytes(tokens, context.size, row_nbytes)
        buffer_nbytes = symmetric_endpoint.buffer_nbytes(region_nbytes)
        control = _control(context)
        problem, memory = None, None
        try:
            memory = symmetric_memory.allocate(buffer_nbytes, context.device, context.group, control.all_gather_json)
        except RuntimeError as error:
            problem = f"symmetric memory: {str(error).splitlines()[0]}"
        control.agree(problem)
        assert memory is not None
        self._memory = memory  # mapped as long as this lives
        self.endpoint = symmetric_endpoint.Endpoint.make(
            context.rank, memory.own, memory.addresses, tokens, region_nbytes, timeout_ns=int(timeout_s * 1e9)
        )

    def check(self) -> None:
        """Waits for the device, then raises CommunicationError where a kernel had to give up on another rank."""
        torch.cuda.synchronize(self._context.device)
        self.raise_if_lost("the last sync point")

    def raise_if_lost(self, where: str) -> None:
        """The same without waiting: finds what earlier calls have run into so far."""
        if lost := self.endpoint.lost_ranks():
            raise CommunicationError(
                f"rank {self._context.rank} waited {self._timeout_s:g} s for rank {ranks_text(lost)} at or before "
                f"{where}; look for what that rank said"
            )


def unserved(scheme: CommScheme) -> str:
    """What a scheme does that no kernel here does, with those that do not; empty where there is nothing."""
    stages = [wire for wire in (scheme.reduce_stage, scheme.gather_stage) if wire is not None]
    if any(wire.rotation for wire in stages):
        return "rotates features; symmetric memory serves formats without -rotated and -hadamardN"
    if any(wire.values == "tc" for wire in stages):
        return "codes values along a trellis; symmetric memory serves formats other than tc2, tc3 and tc4"
    return ""


def reserve(
    context: ParallelContext, scheme: CommScheme, hidden: int, tokens: int = RESERVED_TOKENS
) -> SymmetricBuffers | None:
    """Buffers for all sync points of a model where its ranks' GPUs can address each other, else None; logged.

    A collective call wherever ranks are on GPUs; on CPUs, for schemes of one stage and where one is `unserved`, nothing
    is asked of anybody.
    """
    if context.device.type != "cuda" or context.size == 1 or context.virtual or scheme.gather_stage is None:
        return None
    if why := unserved(scheme):
        logger.info("sync points: messages through the process group (%s %s)", scheme.name, why)
        return None
    if reason := why_missing(context):
        logger.info("sync points: messages through the process group (no symmetric memory: %s)", reason)
        return None
    row_nbytes = max(wire.packet_layout(hidden).row_nbytes for wire in scheme.formats)
    logger.info("sync points: symmetric memory up to %d tokens", tokens)
    return SymmetricBuffers(context, tokens, row_nbytes)


class SymmetricAllReduce:
    """`full_TH = all_reduce(partial_LTH)` over ranks that share `buffers`.

    Raises ValueError for a scheme of one stage, or one that is `unserved`.
    """

    stages = 2

    def __init__(
        self,
        context: ParallelContext,
        scheme: CommScheme,
        hidden: int,
        constants: SyncPointConstants,
        buffers: SymmetricBuffers,
        name: str = "",
    ) -> None:
        from lowbit_kernels import symmetric

        if scheme.gather_stage is None:
            raise ValueError(f"scheme {scheme.name!r} has one stage; symmetric memory serves schemes of two")
        if why := unserved(scheme):
            raise ValueError(f"scheme {scheme.name!r} {why}, others go as messages (TwoStageAllReduce)")
        self._kernels = symmetric
        self._context, self._buffers, self._name = context, buffers, name
        indices = constants.body_index, constants.outlier_index
        self._reduce = symmetric.stage_of(
            scheme.reduce_stage.packet_layout(hidden), constants.reduce_scale_RD, constants.reduce_minimum_RD, *indices
        )
        self._gather = symmetric.stage_of(
            scheme.gather_stage.packet_layout(hidden), constants.gather_scale_1D, constants.gather_minimum_1D, *indices
        )
        self._traffic: dict[int, list[tuple[str, int, int]]] = {}

    @property
    def tokens(self) -> int:
        """The most that a message may have."""
        layouts = self._reduce.layout, self._gather.layout
        return min(self._buffers.endpoint.most_tokens(layout.row_nbytes) for layout in layouts)

    def __call__(self, partial_LTH: torch.Tensor, add_to_TH: torch.Tensor | None = None) -> torch.Tensor:
        """FP32 sum `[T, H]` of all ranks' partials, bit-identical on every rank.

        add_to_TH: FP32; the sum is added to it in place, and it is returned.
        Raises ValueError for more tokens than were reserved, CommunicationError where an earlier call lost a rank.
        """
        (partial_TH,) = partial_LTH
        endpoint = self._buffers.endpoint
        self._buffers.raise_if_lost(self._name or "this sync point")
        out_TH = torch.empty(partial_TH.shape, device=partial_TH.device) if add_to_TH is None else add_to_TH
        self._kernels.push_partials(endpoint, partial_TH, self._reduce)
        self._kernels.push_sums(endpoint, partial_TH.shape[0], self._reduce, self._gather)
        self._kernels.take_sums(endpoint, self._gather, out_TH, add=add_to_TH is not None)
        self._count(partial_TH.shape[0])
        return out_TH

    def _count(self, tokens: int) -> None:
        """What goes to other ranks, as the collectives that send messages count it: packet rows without padding."""
        if tokens not in self._traffic:
            peers, rank = self._context.peers, self._context.rank
            owned = [stop - start for start, stop in cut_evenly(tokens, self._context.size)]
            reduce_nbytes = sum(owned[peer] for peer in peers) * self._reduce.layout.row_nbytes
            gather_nbytes = len(peers) * owned[rank] * self._gather.layout.row_nbytes
            self._traffic[tokens] = [
                (REDUCE, reduce_nbytes, sum(owned[peer] > 0 for peer in peers)),
                (GATHER, gather_nbytes, len(peers) if owned[rank] else 0),
            ]
        for purpose, nbytes, messages in self._traffic[tokens]:
            self._context.traffic.add(purpose, nbytes, messages)


class SymmetricUpToSize:
    """Symmetric memory for messages that fit what was reserved, `beyond` for longer ones: a choice all ranks share."""

    stages = 2

    def __init__(self, symmetric: SymmetricAllReduce, beyond: TwoStageAllReduce) -> None:
        self._symmetric, self._beyond = symmetric, beyond

    def __call__(self, partial_LTH: torch.Tensor, add_to_TH: torch.Tensor | None = None) -> torch.Tensor:
        """FP32 sum `[T, H]` of all ranks' partials, bit-identical on every rank and for both ways."""
        chosen = self._symmetric if partial_LTH.shape[1] <= self._symmetric.tokens else self._beyond
        return chosen(partial_LTH, add_to_TH)


def _control(context: ParallelContext) -> ParallelContext:
    """The same group for JSON about the set-up: gloo carries it from the CPU, also where the ranks compute on GPUs."""
    device = symmetric_memory.control_device(context.group, context.device)
    return replace(context, device=device, traffic=TrafficCounter())


def _local_problem(context: ParallelContext) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    from lowbit_kernels.symmetric_signals import MAX_RANKS

    if context.size > MAX_RANKS:
        return f"the group has {context.size} ranks; at most {MAX_RANKS} can share symmetric memory"
    return ""
