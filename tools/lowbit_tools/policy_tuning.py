"""Measuring a policy: which collective is fastest for each message size, on the links these ranks really have."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowbit_tools.all_reduce_bench import BASELINE, Message
from lowbit_tools.timing import interleaved
from megatron_lowbit.comm.policy import WHOLE, Choice, Policy
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.comm.workspace import Workspace
from megatron_lowbit.parallel import ParallelContext

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PIECES = tuple(kib << 10 for kib in (64, 128, 256, 512, 1024))
#: What is nearly as fast and keeps the numbers better, or is simpler, is taken: a choice must earn its place.
MARGIN = 1.03
#: Beside the fastest, what was this much slower at the size before is not tried again.
HOPELESS = 2.5
LEAST_ROUNDS, MOST_ROUNDS = 5, 60


@dataclass(frozen=True)
class TunedSize:
    """Median microseconds of every choice that was tried for one number of tokens, and of torch's all-reduce."""

    tokens: int
    hidden: int
    choice: str
    median_us: dict[str, float]
    torch_us: float
    rounds: int


def candidates(pieces: bool) -> list[Choice]:
    """All choices, those to be preferred first."""
    cut = [Choice("two-stage", nbytes) for nbytes in reversed(PIECES)] if pieces else []
    return [Choice("exact"), Choice("one-stage"), Choice("two-stage"), *cut, Choice("two-stage", WHOLE)]


def tune(
    context: ParallelContext,
    scheme: CommScheme,
    hidden: int,
    seconds: float,
    backend: str = "auto",
    sizes: Sequence[int] = SIZES,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Policy, list[TunedSize]]:
    """The fastest choice for each size, as a policy, in about `seconds`. The same on all ranks.

    scheme: two-stage, and in need of no calibration but the ranges of the random messages it is timed with.
    """
    assert context.transport is not None
    deadline = time.monotonic() + seconds
    alive = candidates(context.transport.overlaps)
    tuned: list[TunedSize] = []
    chosen: list[Choice] = []
    for done, tokens in enumerate(sizes):
        left = (deadline - time.monotonic()) / (len(sizes) - done)
        row, times = _tune_size(context, scheme, hidden, tokens, alive, left, backend)
        fastest = min(times.values())
        choice = next(one for one in alive if one in times and times[one] <= MARGIN * fastest)
        alive = [one for one in alive if one not in times or times[one] <= HOPELESS * fastest or one == choice]
        tuned.append(TunedSize(tokens, hidden, choice.name, *row))
        chosen.append(choice)
        if progress is not None:
            progress(done + 1, len(sizes))
        if not context.broadcast_json(time.monotonic() < deadline):
            break  # larger sizes go as the largest measured one
    return Policy(_steps(chosen, sizes, hidden), "measured"), tuned


def _tune_size(
    context: ParallelContext,
    scheme: CommScheme,
    hidden: int,
    tokens: int,
    choices: Sequence[Choice],
    seconds: float,
    backend: str,
) -> tuple[tuple[dict[str, float], float, int], dict[Choice, float]]:
    message, workspace = Message(context, tokens, hidden), Workspace()
    calls: dict[str, Callable[[], object]] = {BASELINE: message.torch_call()}
    by_name = {}
    row_nbytes = scheme.reduce_stage.packet_layout(hidden).row_nbytes
    for choice in choices:
        only = Policy(((1 << 62, choice),))
        nbytes = tokens * row_nbytes if choice.collective == "two-stage" and choice.piece_nbytes else 1 << 62
        if nbytes < PIECES[0] or (nbytes < 1.5 * choice.piece_nbytes and choice.piece_nbytes < WHOLE):
            continue  # a single piece, which is tried as such, or by the automatic choice
        by_name[choice.name] = choice
        calls[choice.name] = message.call(message.all_reduce(scheme, backend, only, choice.piece_nbytes, workspace))
    began = time.monotonic()
    interleaved(context, calls, rounds=1, warm_up=1)
    a_round = (time.monotonic() - began) / 2
    rounds = int(max(LEAST_ROUNDS, min(MOST_ROUNDS, seconds / max(a_round, 1e-6))))
    rounds = context.broadcast_json(rounds)
    medians = {name: statistics.median(values) for name, values in interleaved(context, calls, rounds, 1).items()}
    torch_us = 1e6 * medians.pop(BASELINE)
    microseconds = {name: 1e6 * value for name, value in medians.items()}
    return (microseconds, torch_us, rounds), {by_name[name]: value for name, value in medians.items()}


def _steps(chosen: Sequence[Choice], sizes: Sequence[int], hidden: int) -> tuple[tuple[int, Choice], ...]:
    """Borders lie half way (geometrically) between the last size of one choice and the first of the next."""
    steps = []
    for index, choice in enumerate(chosen):
        if index + 1 < len(chosen) and chosen[index + 1] == choice:
            continue
        last = index + 1 == len(chosen)
        border = 1 << 62 if last else int(2 * hidden * (sizes[index] * sizes[index + 1]) ** 0.5)
        steps.append((border, choice))
    return tuple(steps)
