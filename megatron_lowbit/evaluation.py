"""evaluate: what schemes do to a model's predictions on text, against the exact sum, window by window in one run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.comm.exchange import GATHER, REDUCE
from megatron_lowbit.comm.saturation import SaturationLog
from megatron_lowbit.comm.schemes import CommScheme, parse_scheme
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.models.decoder import Decoder
from megatron_lowbit.vocab_parallel import log_normaliser, sum_over_ranks, top_candidates
from megatron_lowbit.weights import ModelWeights

# Shapes: T tokens of a window, V' this rank's part of the vocabulary.

PURPOSE = "evaluation"
#: logits are compared in blocks of rows that stay in a cache
ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class EvaluationRow:
    """Quality and cost of one scheme; `kl_mean` in nats a token against `exact` of the same weights and dtype.

    Bits are those on the wire, padding included. sent_nbytes_per_token_per_rank: at all sync points, mean over ranks.
    kl_stderr: standard error over windows. Speed counts forward passes without the output head.
    saturated_share: of the communicated values, those clamped to a static range; non_finite: NaN and Inf among them.
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
    prefill_tokens_per_s: float
    saturated_share: float
    non_finite: int


@dataclass
class _Tally:
    nll: float = 0.0
    agreed: int = 0
    scored: int = 0
    kl_of_windows: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sent_nbytes: int = 0
    saturation: SaturationLog = field(default_factory=dict)


@dataclass(frozen=True)
class _Reference:
    """What the exact sum predicts: log-probabilities and probabilities `[T-1, V']`, best token of each position."""

    log_probs: torch.Tensor
    probs: torch.Tensor
    best: torch.Tensor


def evaluate(
    weights: ModelWeights,
    schemes: Sequence[str | CommScheme],
    windows: Sequence[Sequence[int]],
    calibration: CommCalibration | None = None,
    progress: Callable[[int, int], None] | None = None,
    backend: str = "auto",
) -> list[EvaluationRow]:
    """One row a scheme, in the order given; the same rows on every rank.

    windows: token ids, all of one length; every position from 1 on is scored. Schemes run one after the other on each
    window, so that their timings are taken side by side. progress: called with (done, total) forward passes.
    Raises ValueError for an unknown scheme or a calibration that is missing or does not fit.
    """
    context = weights.context
    parsed = [parse_scheme(scheme) if isinstance(scheme, str) else scheme for scheme in schemes]
    exact = parse_scheme("exact")
    # `exact` is always run first: it is the reference, whether a row was asked for or not
    others = {scheme.name: scheme for scheme in parsed if scheme.name != exact.name}
    runs = [exact, *others.values()]
    tallies = {scheme.name: _Tally() for scheme in runs}
    models = {
        scheme.name: weights.build_with_scheme(scheme, calibration, backend, tallies[scheme.name].saturation)
        for scheme in runs
    }
    warm_up = TokenBatch.prompts([windows[0]], context.device)
    for name, model in models.items():
        model(warm_up)
        for counter in tallies[name].saturation.values():
            counter.reset()
    done = 0
    for window in windows:
        reference: _Reference | None = None
        for scheme in runs:
            tally = tallies[scheme.name]
            logits_TV = _logits(models[scheme.name], window, tally)
            reference = _score(models[scheme.name], logits_TV, window, reference, tally)
            done += 1
            if progress is not None:
                progress(done, len(runs) * len(windows))
    base = tallies[exact.name]
    tokens = sum(len(window) for window in windows)
    return [_row(weights, scheme, tallies[scheme.name], base, tokens) for scheme in parsed]


def _logits(model: Decoder, window: Sequence[int], tally: _Tally) -> torch.Tensor:
    """FP32 logits `[T-1, V']` of all positions but the last; the tally gets time and bytes of the forward pass."""
    context = model.context
    context.traffic.reset()
    context.barrier()
    began = time.perf_counter()
    hidden_TH = model(TokenBatch.prompts([window], context.device))
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
    tally.seconds.append(time.perf_counter() - began)
    tally.sent_nbytes += sum(context.traffic.sent_nbytes.get(stage, 0) for stage in (REDUCE, GATHER))
    return model.head.precise_logits(hidden_TH[:-1])


def _score(
    model: Decoder, logits_TV: torch.Tensor, window: Sequence[int], reference: _Reference | None, tally: _Tally
) -> _Reference:
    """Adds one window to the tally. The first scheme of a window becomes the reference of the others; returns it."""
    context, first_token = model.context, model.head.start
    log_probs = logits_TV.sub_(log_normaliser(context, logits_TV, PURPOSE)[:, None])
    best = top_candidates(context, log_probs, first_token, 1, PURPOSE)[1][:, 0]
    targets = torch.tensor(window[1:], device=context.device) - first_token
    here = (targets >= 0) & (targets < log_probs.shape[1])
    target_log_prob = log_probs.new_zeros(len(targets), dtype=torch.float64)
    target_log_prob[here] = log_probs[here, targets[here]].double()
    if reference is None:
        reference = _Reference(log_probs, log_probs.exp(), best)
        kl = torch.zeros_like(target_log_prob)
    else:
        kl = torch.cat(
            [
                torch.linalg.vecdot(probs, expected - found).double()
                for probs, expected, found in zip(
                    *(part.split(ROWS_AT_ONCE) for part in (reference.probs, reference.log_probs, log_probs)),
                    strict=True,
                )
            ]
        )
    kl_sum, target_sum = sum_over_ranks(context, torch.stack((kl, target_log_prob)), PURPOSE).sum(dim=1).tolist()
    tally.scored += len(targets)
    tally.nll -= target_sum
    tally.agreed += int((best == reference.best).sum())
    tally.kl_of_windows.append(kl_sum / len(targets))
    return reference


def _row(weights: ModelWeights, scheme: CommScheme, tally: _Tally, base: _Tally, tokens: int) -> EvaluationRow:
    context, hidden = weights.context, weights.config.hidden_size
    names = sorted(tally.saturation) or ["any"]
    wire = scheme.for_dtype(weights.dtype)
    reduce_bits, gather_bits = wire.wire_bits_per_value(hidden, names, weights.config.post_norms)
    sent = sum(context.all_gather_json(tally.sent_nbytes)) if not context.virtual else tally.sent_nbytes
    counters = tally.saturation.values()
    local = [sum(c.values for c in counters), sum(c.saturated for c in counters), sum(c.non_finite for c in counters)]
    values, saturated, non_finite = (sum(column) for column in zip(*context.all_gather_json(local), strict=True))
    slowest = [max(column) for column in zip(*context.all_gather_json(tally.seconds), strict=True)]
    count = len(tally.kl_of_windows)
    mean = math.fsum(tally.kl_of_windows) / count
    variance = math.fsum((kl - mean) ** 2 for kl in tally.kl_of_windows) / max(count - 1, 1)
    return EvaluationRow(
        scheme=scheme.name,
        stages=scheme.stages,
        reduce_bits_per_value=reduce_bits,
        gather_bits_per_value=gather_bits,
        sent_nbytes_per_token_per_rank=sent / context.size / tokens,
        perplexity=math.exp(tally.nll / tally.scored),
        perplexity_ratio=math.exp((tally.nll - base.nll) / tally.scored),
        kl_mean=mean,
        kl_stderr=math.sqrt(variance / count),
        top1_agreement=tally.agreed / tally.scored,
        tokens=tally.scored,
        prefill_tokens_per_s=tokens / count / sorted(slowest)[count // 2],
        saturated_share=saturated / max(values, 1),
        non_finite=non_finite,
    )
