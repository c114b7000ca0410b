"""evaluate: what schemes do to a model's predictions on text, against the exact sum, window by window in one run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.calibration.scheme_file import TunedScheme
from megatron_lowbit.comm.exchange import GATHER, REDUCE
from megatron_lowbit.comm.saturation import SaturationLog
from megatron_lowbit.comm.schemes import CommScheme, parse_scheme
from megatron_lowbit.layers.kv_cache import KVCache, TokenBatch
from megatron_lowbit.models.decoder import Decoder
from megatron_lowbit.scoring import Reference, TokenScores, score
from megatron_lowbit.weights import ModelWeights

# Shapes: N scored positions, V' this rank's part of the vocabulary.

#: Of a window: logits are the largest tensors there are, and three times as many are held.
POSITIONS_AT_ONCE = 512
#: Given a scheme's name and what it made of some positions.
ScoresObserver = Callable[[str, TokenScores], None]


@dataclass(frozen=True)
class DecodePath:
    """Teacher-forced decoding over a KV cache, as `generate` runs it, in place of whole windows at once.

    batch: sequences side by side, so messages of so many tokens. tokens: positions scored of each window, its last
    ones; what stands before them is prefilled with the scheme itself.
    """

    batch: int = 1
    tokens: int = 32

    def check(self, windows: int, length: int) -> None:
        """Raises ValueError where windows of this number and length cannot be decoded so."""
        if not 1 <= self.tokens <= length - 2:
            raise ValueError(
                f"decode path: {self.tokens} tokens of windows of {length} are to be scored; allowed: 1 to "
                f"{length - 2}, behind a prompt of at least 1"
            )
        if self.batch < 1 or not windows or windows % self.batch:
            raise ValueError(
                f"decode path: {windows} windows in batches of {self.batch}; give a multiple of the batch, at least "
                "one batch (a longer text or shorter windows give more)"
            )


@dataclass(frozen=True)
class EvaluationRow:
    """Quality and cost of one scheme; `kl_mean` in nats a token against `exact` of the same weights and dtype.

    Bits are those on the wire, padding included. sent_nbytes_per_token_per_rank: at all sync points, mean over ranks.
    kl_stderr: standard error over windows. Speed counts forward passes without the output head; of the path that was
    evaluated, None for the other. batch: sequences side by side.
    saturated_share: of the communicated values, those clamped to a static range, prompts included; non_finite: NaN and
    Inf among them.
    """

    scheme: str
    stages: int
    reduce_bits_per_value: float
    gather_bits_per_value: float | None
    sent_nbytes_per_token_per_rank: float
    perplexity: float
    perplexity_ratio: float
    kl_mean: float
    kl_stderr: float
    top1_agreement: float
    tokens: int
    prefill_tokens_per_s: float | None
    saturated_share: float
    non_finite: int
    path: str = "prefill"
    batch: int = 1
    decode_tokens_per_s: float | None = None


@dataclass
class _Tally:
    nll: float = 0.0
    agreed: int = 0
    scored: int = 0
    kl_of_windows: dict[int, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    passed_tokens: int = 0
    sent_nbytes: int = 0
    saturation: SaturationLog = field(default_factory=dict)

    def add(self, scores: TokenScores) -> None:
        self.scored += len(scores.nll_N)
        self.nll += float(scores.nll_N.sum())
        self.agreed += int(scores.agreed_N.sum())
        for window, kl in zip(scores.windows_N.tolist(), scores.kl_N.tolist(), strict=True):
            self.kl_of_windows.setdefault(window, []).append(kl)


def evaluate(
    weights: ModelWeights,
    schemes: Sequence[str | CommScheme | TunedScheme],
    windows: Sequence[Sequence[int]],
    calibration: CommCalibration | None = None,
    progress: Callable[[int, int], None] | None = None,
    backend: str = "auto",
    decode: DecodePath | None = None,
    observer: ScoresObserver | None = None,
) -> list[EvaluationRow]:
    """One row a scheme, in the order given; the same rows on every rank.

    windows: token ids, all of one length; every position from 1 on is scored. Schemes run one after the other on each
    window, so that their timings are taken side by side. calibration: of schemes that bring none of their own.
    progress: called with (done, total) steps: forward passes, of long windows more.
    decode: evaluate that path instead; every scheme keeps a KV cache of `batch` windows meanwhile. observer: given the
    scores of all positions, those of `exact` too.
    Raises ValueError for an unknown scheme, different ones of one name, or a calibration that is missing or does not
    fit.
    """
    context = weights.context
    if decode is not None:
        decode.check(len(windows), len(windows[0]) if windows else 0)
    exact = parse_scheme("exact")
    # `exact` is always run first: it is the reference, whether a row was asked for or not
    parsed, calibrated = calibrated_schemes(exact.name, schemes, calibration)
    runs = [scheme for scheme, _ in calibrated.values()]
    tallies = {scheme.name: _Tally() for scheme in runs}
    models = {
        name: weights.build_with_scheme(scheme, its_calibration, backend, tallies[name].saturation)
        for name, (scheme, its_calibration) in calibrated.items()
    }
    warm_up = TokenBatch.prompts([windows[0]], context.device)
    for name, model in models.items():
        model(warm_up)
        for counter in tallies[name].saturation.values():
            counter.reset()
    batch, last = (1 if decode is None else decode.batch), len(windows[0]) - 1
    # what is scored at once: a stretch of one window, or a position of each of some windows
    first_scored, at_once = (0, POSITIONS_AT_ONCE) if decode is None else (last - decode.tokens, 1)
    steps = [range(at, min(at + at_once, last)) for at in range(first_scored, last, at_once)]
    done, total = 0, len(runs) * len(steps) * (len(windows) // batch)
    for first in range(0, len(windows), batch):
        group = windows[first : first + batch]
        passes = [_passes(models[scheme.name], group, steps, tallies[scheme.name], decode) for scheme in runs]
        for positions in steps:
            asked = [(first + row, at, window[at + 1]) for row, window in enumerate(group) for at in positions]
            reference: Reference | None = None
            for scheme, each in zip(runs, passes, strict=True):
                reference, scores = score(context, next(each), models[scheme.name].head.start, asked, reference)
                tallies[scheme.name].add(scores)
                if observer is not None:
                    observer(scheme.name, scores)
                done += 1
                if progress is not None:
                    progress(done, total)
    base = tallies[exact.name]
    return [_row(weights, scheme, tallies[scheme.name], base, decode) for scheme in parsed]


def calibrated_schemes(
    reference: str, schemes: Sequence[str | CommScheme | TunedScheme], calibration: CommCalibration | None
) -> tuple[list[CommScheme], dict[str, tuple[CommScheme, CommCalibration | None]]]:
    """The schemes as asked for, and by name, the `reference` first, those to run with the calibration of each.

    calibration: of those that bring none. Raises ValueError for an unknown scheme, or different ones of one name.
    """
    first = parse_scheme(reference)
    calibrated = {first.name: (first, calibration)}
    parsed = []
    for given in schemes:
        scheme = given.scheme if isinstance(given, TunedScheme) else given
        scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
        own = given.calibration if isinstance(given, TunedScheme) else calibration
        known, its_calibration = calibrated.setdefault(scheme.name, (scheme, own))
        if known != scheme or its_calibration is not own:
            raise ValueError(f"two different schemes are called {scheme.name!r}; rename one of the files")
        parsed.append(scheme)
    return parsed, calibrated


def _passes(
    model: Decoder, group: Sequence[Sequence[int]], steps: Sequence[range], tally: _Tally, decode: DecodePath | None
) -> Iterator[torch.Tensor]:
    """FP32 logits `[N, V']` of each step's positions, computed when they are asked for."""
    device = model.context.device
    if decode is None:
        hidden_TH = _timed(model, TokenBatch.prompts(group, device), None, tally)
        for positions in steps:
            yield model.head.precise_logits(hidden_TH[positions.start : positions.stop])
        return
    cache = model.new_cache(len(group), steps[-1].stop)
    model(TokenBatch.prompts([window[: steps[0].start] for window in group], device), cache)
    for positions in steps:
        tokens = torch.tensor([window[positions.start] for window in group], device=device)
        new = TokenBatch(tokens, (1,) * len(group), tuple(cache.lengths))
        yield model.head.precise_logits(_timed(model, new, cache, tally))


def _timed(model: Decoder, batch: TokenBatch, cache: KVCache | None, tally: _Tally) -> torch.Tensor:
    """Hidden states `[T, H]`; the tally gets time and bytes of the forward pass."""
    context = model.context
    context.traffic.reset()
    context.barrier()
    began = time.perf_counter()
    hidden_TH = model(batch, cache)
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
    tally.seconds.append(time.perf_counter() - began)
    tally.passed_tokens += hidden_TH.shape[0]
    tally.sent_nbytes += sum(context.traffic.sent_nbytes.get(stage, 0) for stage in (REDUCE, GATHER))
    return hidden_TH


def _row(
    weights: ModelWeights, scheme: CommScheme, tally: _Tally, base: _Tally, decode: DecodePath | None
) -> EvaluationRow:
    context, hidden = weights.context, weights.config.hidden_size
    wire = scheme.for_dtype(weights.dtype)
    reduce_bits, gather_bits = wire.wire_bits_per_value(hidden, weights.config.sync_points, weights.config.post_norms)
    sent = sum(context.all_gather_json(tally.sent_nbytes)) if not context.virtual else tally.sent_nbytes
    counters = tally.saturation.values()
    local = [sum(c.values for c in counters), sum(c.saturated for c in counters), sum(c.non_finite for c in counters)]
    values, saturated, non_finite = (sum(column) for column in zip(*context.all_gather_json(local), strict=True))
    slowest = [max(column) for column in zip(*context.all_gather_json(tally.seconds), strict=True)]
    speed = tally.passed_tokens / len(slowest) / sorted(slowest)[len(slowest) // 2]
    means = [math.fsum(kls) / len(kls) for kls in tally.kl_of_windows.values()]
    mean = math.fsum(means) / len(means)
    variance = math.fsum((kl - mean) ** 2 for kl in means) / max(len(means) - 1, 1)
    return EvaluationRow(
        scheme=scheme.name,
        stages=scheme.stages,
        reduce_bits_per_value=reduce_bits,
        gather_bits_per_value=gather_bits,
        sent_nbytes_per_token_per_rank=sent / context.size / tally.passed_tokens,
        perplexity=math.exp(tally.nll / tally.scored),
        perplexity_ratio=math.exp((tally.nll - base.nll) / tally.scored),
        kl_mean=mean,
        kl_stderr=math.sqrt(variance / len(means)),
        top1_agreement=tally.agreed / tally.scored,
        tokens=tally.scored,
        prefill_tokens_per_s=speed if decode is None else None,
        saturated_share=saturated / max(values, 1),
        non_finite=non_finite,
        path="prefill" if decode is None else "decode",
        batch=1 if decode is None else decode.batch,
        decode_tokens_per_s=None if decode is None else speed,
    )
