"""Time to first token and decode speed of a model under several schemes, which take turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from lowbit_tools.all_reduce_bench import BASELINE, TorchAllReduce
from lowbit_tools.communication_clock import ELSEWHERE, SYNC, CommunicationClock, time_sync_points
from lowbit_tools.timing import ratio_interval
from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.calibration.scheme_file import TunedScheme
from megatron_lowbit.calibration_run import calibrate, text_digest
from megatron_lowbit.comm.all_reduce import SingleRankAllReduce
from megatron_lowbit.comm.exchange import GATHER, REDUCE
from megatron_lowbit.comm.policy import Policy
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.generate import TokenGeneration
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.models.decoder import Decoder
from megatron_lowbit.sampling import SamplingParams
from megatron_lowbit.weights import ModelWeights

ONE_RANK = "one rank"
#: Random sequences that give static schemes their scales where no calibration is given, and their tokens.
OWN_CALIBRATION = (4, 32)
_CHECKED_TOKENS = 16
_WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class ModelRow:
    """Medians over interleaved rounds for one prompt length and one way to communicate.

    ttft_s: from a prompt to its first token; step_s: one later token (T = 1, batch 1); both the slowest rank's, with
    the lowest and highest round. Ratios above 1 are faster than torch's all-reduce, with their 95 % interval; None on
    one rank. sync_s: of the rank that has most work of its own, since the others also wait for it at sync points;
    elsewhere_s: its waiting for embedding rows and best tokens. sent_nbytes: payload of the rank that sends most, at
    sync points and elsewhere; None for torch's own all-reduce, which does not say.
    """

    prompt_tokens: int
    scheme: str
    tp: int
    rounds: int
    new_tokens: int
    ttft_s: float
    ttft_low_s: float
    ttft_high_s: float
    ttft_ratio_to_torch: float | None
    ttft_ratio_interval: tuple[float, float] | None
    ttft_sync_s: float
    ttft_sync_share: float
    ttft_elsewhere_s: float
    ttft_sent_nbytes: int | None
    ttft_elsewhere_nbytes: int
    ttft_collective: str
    step_s: float
    step_low_s: float
    step_high_s: float
    step_ratio_to_torch: float | None
    step_ratio_interval: tuple[float, float] | None
    step_sync_s: float
    step_sync_share: float
    step_elsewhere_s: float
    step_sent_nbytes: int | None
    step_elsewhere_nbytes: int
    step_collective: str
    decode_tokens_per_s: float


@dataclass
class Variant:
    """One way to communicate. Each has a model of its own, over weights that all of them share."""

    name: str
    model: Decoder
    sync_points: int
    policy: Policy | None = None
    #: this rank's rounds of (prompt, step), each as `_Pass` has its fields
    rounds: list[list[list[float]]] = field(default_factory=list)

    def collective(self, tokens: int) -> str:
        """What the policy takes for a message of this many tokens; nothing where there is none."""
        return "" if self.policy is None else self.policy.choose(tokens, self.model.config.hidden_size).name


def variants(
    weights: ModelWeights,
    schemes: Sequence[CommScheme | TunedScheme],
    calibration: CommCalibration | None,
    policy: Policy | None,
    backend: str,
    clock: CommunicationClock,
) -> list[Variant]:
    """torch's all-reduce, every scheme at every size, and those below 16 bits under the policy. One rank: itself."""

    def timed(name: str, model: Decoder, policy: Policy | None = None) -> Variant:
        return Variant(name, model, time_sync_points(model, clock), policy)

    if weights.context.size == 1:
        return [timed(ONE_RANK, weights.build(lambda name: SingleRankAllReduce()))]
    found = [timed(BASELINE, weights.build(lambda name: TorchAllReduce(weights.context)))]
    for given in schemes:
        scheme, own = (given.scheme, given.calibration) if isinstance(given, TunedScheme) else (given, calibration)
        found.append(timed(scheme.name, weights.build_with_scheme(scheme, own, backend)))
        row_nbytes = scheme.reduce_stage.packet_layout(weights.config.hidden_size).row_nbytes
        if policy is not None and scheme.gather_stage is not None and row_nbytes < 2 * weights.config.hidden_size:
            model = weights.build_with_scheme(scheme, own, backend, policy=policy)
            found.append(timed(f"{scheme.name}, policy", model, policy))
    return found


def own_calibration(weights: ModelWeights) -> CommCalibration:
    """Ranges of random tokens: good enough to time static schemes with, not to generate text."""
    sequences, length = OWN_CALIBRATION
    prompts = [random_prompt(weights.config.vocab_size, length, seed) for seed in range(sequences)]
    return calibrate(weights, prompts, text_digest("random tokens"))


def random_prompt(vocabulary: int, length: int, seed: int = 0) -> list[int]:
    """Token ids, the same on all ranks."""
    tokens: list[int] = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


def check_replicas(variant: Variant) -> None:
    """AssertionError unless all ranks leave a forward pass with the same finite hidden states."""
    context = variant.model.context
    batch = TokenBatch.prompts([random_prompt(variant.model.config.vocab_size, _CHECKED_TOKENS)], context.device)
    hidden_TH = variant.model(batch).float()
    assert bool(torch.isfinite(hidden_TH).all()), f"{variant.name}: hidden states are not finite"
    digests = context.all_gather_json(text_digest(str(hidden_TH.cpu().view(torch.int32).tolist())))
    assert len(set(digests)) == 1, f"{variant.name}: ranks hold different hidden states"


def bench_model(
    candidates: Sequence[Variant],
    prompt_lengths: Sequence[int],
    new_tokens: int,
    rounds: int,
    clock: CommunicationClock,
    progress: Callable[[int, int], None] | None = None,
) -> list[ModelRow]:
    """A row for each prompt length and variant. Called on all ranks alike; the same on all of them.

    new_tokens: at least 2, the first of which is the prompt's. clock: the one that `variants` was given. Each variant
    warms up with the beginning of the prompt; buffers of its full length are made in the first round, which a median
    of three forgets.
    """
    for variant in candidates:
        check_replicas(variant)
    rows: list[ModelRow] = []
    for done, length in enumerate(prompt_lengths):
        prompt = random_prompt(candidates[0].model.config.vocab_size, length)
        for variant in candidates:
            variant.rounds = []
            _generate(variant, prompt[:_WARM_UP_TOKENS], 2, clock)
        for turn in range(rounds):
            first = turn % len(candidates)  # nobody always follows the same neighbour
            for variant in (*candidates[first:], *candidates[:first]):
                prefill, *steps = _generate(variant, prompt, new_tokens, clock)
                variant.rounds.append([prefill, [statistics.median(values) for values in zip(*steps, strict=True)]])
            if progress is not None:
                progress(done * rounds + turn + 1, len(prompt_lengths) * rounds)
        rows += _rows(candidates, length, new_tokens)
    return rows


class _Pass(NamedTuple):
    """One forward pass and the choice of a token on one rank: seconds, and payload that it sent."""

    seconds: float
    sync_s: float
    elsewhere_s: float
    sync_nbytes: float
    elsewhere_nbytes: float


def _generate(variant: Variant, prompt: list[int], new_tokens: int, clock: CommunicationClock) -> list[list[float]]:
    """A `_Pass`, as a list, for each new token of one generation on this rank."""
    context = variant.model.context
    generation = TokenGeneration(variant.model, [prompt], SamplingParams(new_tokens, ignore_eos=True))
    passes = []
    for _ in range(new_tokens):
        context.barrier()
        context.traffic.reset()
        clock.reset()
        began = time.perf_counter()
        generation.step()
        seconds = time.perf_counter() - began
        assert clock.calls == variant.sync_points, f"{variant.name}: {clock.calls} all-reduces in a pass"
        at_sync = sum(context.traffic.sent_nbytes.get(purpose, 0) for purpose in (REDUCE, GATHER))
        elsewhere = context.traffic.total_nbytes() - at_sync
        passes.append([*_Pass(seconds, clock.seconds(SYNC), clock.seconds(ELSEWHERE), at_sync, elsewhere)])
    return passes


@dataclass(frozen=True)
class _Phase:
    """Prompt or step of one variant, over its rounds and ranks."""

    seconds: list[float]
    sync_s: float
    sync_share: float
    elsewhere_s: float
    sync_nbytes: int
    elsewhere_nbytes: int

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @classmethod
    def of(cls, ranks: list[list[list[list[float]]]], phase: int) -> _Phase:
        """From what every rank keeps in `Variant.rounds`."""
        seconds, sync, share, elsewhere = [], [], [], []
        for one_round in zip(*ranks, strict=True):
            passes = [_Pass(*rank[phase]) for rank in one_round]
            busiest = max(passes, key=lambda one: one.seconds - one.sync_s - one.elsewhere_s)
            seconds.append(max(one.seconds for one in passes))
            sync.append(busiest.sync_s)
            share.append(busiest.sync_s / busiest.seconds)
            elsewhere.append(busiest.elsewhere_s)
        sent = [_Pass(*rank[0][phase]) for rank in ranks]
        return cls(
            seconds,
            statistics.median(sync),
            statistics.median(share),
            statistics.median(elsewhere),
            int(max(one.sync_nbytes for one in sent)),
            int(max(one.elsewhere_nbytes for one in sent)),
        )

    def ratio(self, baseline: _Phase | None) -> tuple[float | None, tuple[float, float] | None]:
        """How much faster than the baseline, with a 95 % interval."""
        if baseline is None:
            return None, None
        return baseline.median_s / self.median_s, ratio_interval(baseline.seconds, self.seconds)


def _rows(candidates: Sequence[Variant], length: int, new_tokens: int) -> list[ModelRow]:
    context = candidates[0].model.context
    gathered = {variant.name: context.all_gather_json(variant.rounds) for variant in candidates}
    phases = {name: [_Phase.of(ranks, phase) for phase in range(2)] for name, ranks in gathered.items()}
    baseline_prefill, baseline_step = phases.get(BASELINE, (None, None))
    rows = []
    for variant in candidates:
        prefill, step = phases[variant.name]
        ttft_ratio, ttft_interval = prefill.ratio(baseline_prefill)
        step_ratio, step_interval = step.ratio(baseline_step)
        says_bytes = variant.name != BASELINE
        rows.append(
            ModelRow(
                prompt_tokens=length,
                scheme=variant.name,
                tp=context.size,
                rounds=len(prefill.seconds),
                new_tokens=new_tokens,
                ttft_s=prefill.median_s,
                ttft_low_s=min(prefill.seconds),
                ttft_high_s=max(prefill.seconds),
                ttft_ratio_to_torch=ttft_ratio,
                ttft_ratio_interval=ttft_interval,
                ttft_sync_s=prefill.sync_s,
                ttft_sync_share=prefill.sync_share,
                ttft_elsewhere_s=prefill.elsewhere_s,
                ttft_sent_nbytes=prefill.sync_nbytes if says_bytes else None,
                ttft_elsewhere_nbytes=prefill.elsewhere_nbytes,
                ttft_collective=variant.collective(length),
                step_s=step.median_s,
                step_low_s=min(step.seconds),
                step_high_s=max(step.seconds),
                step_ratio_to_torch=step_ratio,
                step_ratio_interval=step_interval,
                step_sync_s=step.sync_s,
                step_sync_share=step.sync_share,
                step_elsewhere_s=step.elsewhere_s,
                step_sent_nbytes=step.sync_nbytes if says_bytes else None,
                step_elsewhere_nbytes=step.elsewhere_nbytes,
                step_collective=variant.collective(1),
                decode_tokens_per_s=1.0 / step.median_s,
            )
        )
    return rows
