"""Latency of all-reduces: each scheme, the policy's choice and torch's own take turns in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lowbit_tools.joined_all_reduce import JoinedAllReduce, random_input, with_moments
from lowbit_tools.timing import interleaved, ratio_interval
from megatron_lowbit.calibration.artifact import SyncPointStatistics
from megatron_lowbit.calibration.observer import RangeObserver
from megatron_lowbit.calibration.outliers import constants_from_statistics
from megatron_lowbit.comm.all_reduce import AllReduce, build_all_reduce
from megatron_lowbit.comm.compensation import CompensatedAllReduce
from megatron_lowbit.comm.constants import SyncPointConstants
from megatron_lowbit.comm.exchange import AUTOMATIC
from megatron_lowbit.comm.policy import Policy
from megatron_lowbit.comm.reference import all_reduce as reference_all_reduce
from megatron_lowbit.comm.schemes import CommScheme, parse_scheme
from megatron_lowbit.comm.workspace import Workspace
from megatron_lowbit.parallel import ParallelContext

# Shapes: R ranks, T tokens, H hidden features.

BASELINE = "torch.distributed.all_reduce"


@dataclass(frozen=True)
class AllReduceRow:
    """Microseconds of the slowest rank over interleaved rounds; ratio above 1 is faster than torch's all-reduce.

    chosen: what the policy took, for its rows. ratio_low, ratio_high: 95 % interval of the ratio of medians.
    sent_nbytes: payload of the rank that sends most, in one call; None for torch's own, which does not say.
    """

    tokens: int
    hidden: int
    scheme: str
    tp: int
    median_us: float
    p10_us: float
    p90_us: float
    ratio_to_torch_all_reduce: float
    ratio_low: float
    ratio_high: float
    chosen: str
    rounds: int
    sent_nbytes: int | None


class Message:
    """Random bf16 partials of one size: all ranks draw all of them, so that each can check the result by itself."""

    def __init__(self, context: ParallelContext, tokens: int, hidden: int) -> None:
        generator = torch.Generator().manual_seed(tokens)
        self.partials = [torch.randn(tokens, hidden, generator=generator).bfloat16() for _ in range(context.size)]
        self.input_TH = random_input(tokens, hidden)
        self.mine_LTH = self.partials[context.rank].to(context.device).unsqueeze(0)
        #: written again and again, as torch's all-reduce does with its argument
        self.out_TH = torch.zeros(tokens, hidden, device=context.device)
        self._context = context

    def all_reduce(
        self, scheme: CommScheme, backend: str, policy: Policy | None, piece_nbytes: int, workspace: Workspace
    ) -> AllReduce:
        """The collective for this message; its scales fit these values, as latency does not depend on them."""
        wire = scheme.for_dtype(torch.bfloat16)
        constants = self._constants(wire).to(self._context.device)
        hidden = self.out_TH.shape[1]
        collective = build_all_reduce(
            self._context, wire, hidden, constants, backend, policy=policy, piece_nbytes=piece_nbytes,
            workspace=workspace,
        )  # fmt: skip
        if isinstance(collective, CompensatedAllReduce) or not scheme.portable:
            return JoinedAllReduce(collective, self.input_TH.to(self._context.device))
        return collective

    def check(self, all_reduce: AllReduce, scheme: CommScheme) -> None:
        """AssertionError unless the result is the reference's, bit for bit."""
        wire = scheme.for_dtype(torch.bfloat16)
        constants = self._constants(wire)
        if wire.portable:
            expected = reference_all_reduce(self.partials, wire, constants)
        else:  # what compensates has no reference but itself, with all ranks in one process
            virtual = ParallelContext.virtual_ranks(len(self.partials))
            alone = build_all_reduce(virtual, wire, self.out_TH.shape[1], constants)
            expected = JoinedAllReduce(alone, self.input_TH)(torch.stack(self.partials))
        assert torch.equal(all_reduce(self.mine_LTH).cpu(), expected), f"{scheme.name} differs from the reference"

    def _constants(self, scheme: CommScheme) -> SyncPointConstants:
        stacked_RTH = torch.stack(self.partials).float()
        if stacked_RTH.shape[1] == 0:
            stacked_RTH = torch.ones(len(self.partials), 1, stacked_RTH.shape[2])
        point = with_moments(_statistics(stacked_RTH), scheme, stacked_RTH)
        return constants_from_statistics(scheme, "bench", point)

    def call(self, all_reduce: AllReduce) -> Callable[[], object]:
        return lambda: all_reduce(self.mine_LTH, self.out_TH)

    def torch_call(self) -> Callable[[], object]:
        """torch's all-reduce of the bf16 partials."""
        buffer = torch.empty_like(self.mine_LTH[0])

        def call() -> None:
            # the in-place sum would grow without bound; the copy is the same for a caller that keeps its partial
            buffer.copy_(self.mine_LTH[0])
            dist.all_reduce(buffer, group=self._context.group)

        return call


class TorchAllReduce:
    """torch's own all-reduce as a model's collective: the partials as they are, 16 bits for bf16 ones.

    Sums into the partial, which nothing uses afterwards.
    """

    def __init__(self, context: ParallelContext) -> None:
        self._group = context.group

    def __call__(self, partial_LTH: torch.Tensor, add_to_TH: torch.Tensor | None = None) -> torch.Tensor:
        (partial_TH,) = partial_LTH
        dist.all_reduce(partial_TH, group=self._group)
        return partial_TH.float() if add_to_TH is None else add_to_TH.add_(partial_TH)


def bench_all_reduce(
    context: ParallelContext,
    sizes: Sequence[int],
    hidden: int,
    schemes: Sequence[CommScheme],
    rounds: int,
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    policy: Policy | None = None,
    piece_nbytes: int = AUTOMATIC,
) -> list[AllReduceRow]:
    """Rows of torch's baseline and every scheme for each number of tokens; with a policy, its choice for each too.

    Each result is compared bit for bit with the reference before anything is timed; AssertionError where they differ.
    """
    rows = []
    for done, tokens in enumerate(sizes):
        message, workspace = Message(context, tokens, hidden), Workspace()
        calls: dict[str, Callable[[], object]] = {BASELINE: message.torch_call()}
        chosen, sent = {}, {}
        for scheme in schemes:
            forced = message.all_reduce(scheme, backend, None, piece_nbytes, workspace)
            sent[scheme.name] = _sent_nbytes(context, message, forced, scheme)
            calls[scheme.name] = message.call(forced)
            if policy is not None and scheme.gather_stage is not None:
                name, choice = f"{scheme.name}, policy", policy.choose(tokens, hidden)
                chosen[name] = choice.name
                free = message.all_reduce(scheme, backend, policy, piece_nbytes, workspace)
                actual = scheme
                if choice.collective == "exact":
                    actual = parse_scheme("exact:one-stage")
                elif choice.collective == "one-stage" and scheme.portable:
                    actual = parse_scheme(f"{scheme.name}:one-stage")
                sent[name] = _sent_nbytes(context, message, free, actual)
                calls[name] = message.call(free)
        times = interleaved(context, calls, rounds)
        baseline = statistics.median(times[BASELINE])
        for name, seconds in times.items():
            ordered = sorted(1e6 * value for value in seconds)
            median = statistics.median(ordered)
            low, high = ratio_interval(times[BASELINE], seconds)
            rows.append(
                AllReduceRow(
                    tokens, hidden, name, context.size, median, ordered[len(ordered) // 10],
                    ordered[9 * len(ordered) // 10], 1e6 * baseline / median, low, high, chosen.get(name, ""), rounds,
                    sent.get(name),
                )
            )  # fmt: skip
        if progress is not None:
            progress(done + 1, len(sizes))
    return rows


def _sent_nbytes(context: ParallelContext, message: Message, all_reduce: AllReduce, scheme: CommScheme) -> int:
    """Checks one call, and says what the busiest rank sent in it."""
    context.traffic.reset()
    message.check(all_reduce, scheme)
    sent = context.traffic.total_nbytes()
    return int(max(context.all_gather_json(sent)))


def _statistics(stacked_RTH: torch.Tensor) -> SyncPointStatistics:
    """Ranges of these very values: latency does not depend on them, the check before timing does."""
    partial, total = RangeObserver(), RangeObserver()
    partial.update(stacked_RTH)
    total.update(stacked_RTH.sum(dim=0, keepdim=True))
    assert partial.minimum is not None and partial.maximum is not None
    assert total.minimum is not None and total.maximum is not None
    return SyncPointStatistics(partial.minimum, partial.maximum, total.minimum[0], total.maximum[0])
