"""evaluate_tasks: what schemes do to a model's answers to zero-shot tasks, beside those of 16 bits, in one run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.calibration.scheme_file import TunedScheme
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.evaluation import calibrated_schemes
from megatron_lowbit.quality_report_statistics import Interval
from megatron_lowbit.task_questions import (
    ANSWER_PREFIX,
    LAST_WORDS,
    MULTIPLE_CHOICE,
    ScoredSequence,
    Task,
    scored_sequences,
)
from megatron_lowbit.task_scoring import AnswerScores, passes, score_answers
from megatron_lowbit.task_statistics import Flips, Resampled, resample
from megatron_lowbit.weights import ModelWeights
from megatron_lowbit.windows import Encoder

# Shapes: Q questions.

BASELINE = "bf16"
ACC, ACC_NORM, LOG_LIKELIHOOD = "acc", "acc_norm", "log_likelihood"
#: Name and kind of the rows that average the tasks.
MEAN = "mean"


@dataclass(frozen=True)
class TaskRow:
    """One scheme's score on a task, or (`MEAN`) on the mean task, beside the baseline's; intervals are 95 %, paired.

    metric: `acc`, the share of questions answered rightly, by the likeliest choice (the first of equal ones) or where
    each token of the last words is the likeliest one; `acc_norm`, by the choice of the largest log-likelihood a
    character. The mean of `acc_norm` takes `acc` of tasks that have no choices. retained: score / baseline's, None
    where that is 0. flips: see `Flips`; an answer in last words is the likeliest token in each place.
    log_likelihood: of the right answer, nats, mean over questions; perplexity: exp(-log_likelihood), of last words.
    tokens: that went through the model, over all its passes, and how many a second, the head included.
    """

    task: str
    kind: str
    scheme: str
    metric: str
    questions: int
    score: Interval
    difference: Interval
    retained: Interval | None
    flips: Flips
    log_likelihood: float
    log_likelihood_change: Interval
    perplexity: float | None
    tokens: int
    tokens_per_s: float

    def fields(self) -> dict[str, str | int | float | None]:
        """Flat, for a file: intervals as `name`, `name_low`, `name_high`; what is not finite is None."""
        flat: dict[str, str | int | float | None] = {}
        for name, value in vars(self).items():
            if isinstance(value, Interval):
                flat |= value.row(name)
            elif name == "retained":
                flat |= dict.fromkeys(("retained", "retained_low", "retained_high"))
            else:
                flat |= vars(value) if isinstance(value, Flips) else {name: value}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in flat.items()
        }


@dataclass
class _Tally:
    """One scheme's answers to a task."""

    log_likelihoods: list[float] = field(default_factory=list)
    likeliest: list[tuple[int, ...]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, scores: AnswerScores, seconds: float) -> None:
        self.log_likelihoods += scores.log_likelihood_S.tolist()
        self.likeliest += scores.likeliest
        self.seconds += seconds


@dataclass(frozen=True)
class _Answers:
    """By metric: each question's answer, and whether it is right (bool `[Q]`). Of right answers: nats, FP64 `[Q]`."""

    given: Mapping[str, list[Hashable]]
    right: Mapping[str, torch.Tensor]
    log_likelihood_Q: torch.Tensor


@dataclass(frozen=True)
class _Result:
    """What a row is made of: resampled means by measure, flips by metric."""

    means: Mapping[str, Resampled]
    flips: Mapping[str, Flips]
    questions: int
    tokens: int
    seconds: float


def evaluate_tasks(
    weights: ModelWeights,
    schemes: Sequence[str | CommScheme | TunedScheme],
    tasks: Sequence[Task],
    tokenizer: Encoder,
    calibration: CommCalibration | None = None,
    progress: Callable[[int, int], None] | None = None,
    backend: str = "auto",
    answer_prefix: str = ANSWER_PREFIX,
) -> list[TaskRow]:
    """Rows by task (their mean last, where there are several), metric and scheme; the same on every rank.

    schemes: `bf16` is run first, named or not. calibration: of schemes that bring none of their own.
    answer_prefix: see `scored_sequences`. progress: called with (done, total) forward passes. What a model makes of a
    question does not depend on those it is batched with, but for the rounding of products of other shapes.
    Raises ValueError for an unknown scheme, different ones of one name, a calibration that is missing or does not fit,
    tasks of one name, or a question that is too long.
    """
    context, room = weights.context, weights.config.max_position
    names = [task.name for task in tasks]
    if not names or len({*names, MEAN}) <= len(names):
        raise ValueError(f"tasks are called {', '.join(names) or 'nothing'}; give each a name of its own, not {MEAN!r}")
    _, runs = calibrated_schemes(BASELINE, schemes, calibration)
    cut = context.together(lambda: [scored_sequences(tokenizer, task, room, answer_prefix) for task in tasks])
    models = {name: weights.build_with_scheme(scheme, own, backend) for name, (scheme, own) in runs.items()}
    total = len(models) * sum(1 for sequences in cut for _ in passes(sequences))
    done = 0
    results: list[dict[str, _Result]] = []
    for number, (task, sequences) in enumerate(zip(tasks, cut, strict=True)):
        tallies = {name: _Tally() for name in models}
        for group in passes(sequences):
            for name, model in models.items():
                began = time.perf_counter()
                scores = score_answers(model, group, task.kind == LAST_WORDS)
                tallies[name].add(scores, time.perf_counter() - began)
                done += 1
                if progress is not None:
                    progress(done, total)
        results.append(_results(weights, task, sequences, tallies, seed=number))
    rows: list[TaskRow] = []
    for task, found in zip(tasks, results, strict=True):
        rows += _rows(task.name, task.kind, found, (ACC, ACC_NORM) if task.kind == MULTIPLE_CHOICE else (ACC,))
    if len(tasks) > 1:
        metrics = (ACC, ACC_NORM) if any(task.kind == MULTIPLE_CHOICE for task in tasks) else (ACC,)
        rows += _rows(MEAN, MEAN, {name: _mean([found[name] for found in results], metrics) for name in runs}, metrics)
    return rows


def _results(
    weights: ModelWeights, task: Task, sequences: Sequence[ScoredSequence], tallies: Mapping[str, _Tally], seed: int
) -> dict[str, _Result]:
    answers = {name: _answers(task, sequences, tally) for name, tally in tallies.items()}
    base = answers[BASELINE]
    columns: dict[Hashable, torch.Tensor] = {}
    for name, found in answers.items():
        columns |= {(name, metric): right_Q for metric, right_Q in found.right.items()}
        columns[name, LOG_LIKELIHOOD] = found.log_likelihood_Q
    means = resample(columns, seed)
    tokens = sum(len(sequence.tokens) for sequence in sequences)
    results = {}
    for name, found in answers.items():
        flips = {
            metric: Flips.between(found.given[metric], right_Q, base.given[metric], base.right[metric])
            for metric, right_Q in found.right.items()
        }
        own = {measure: means[name, measure] for measure in (*found.right, LOG_LIKELIHOOD)}
        slowest = max(weights.context.all_gather_json(tallies[name].seconds))
        results[name] = _Result(own, flips, len(task.questions), tokens, slowest)
    return results


def _answers(task: Task, sequences: Sequence[ScoredSequence], tally: _Tally) -> _Answers:
    golds = [question.gold for question in task.questions]
    if task.kind == LAST_WORDS:
        expected = [sequence.tokens[sequence.first_scored :] for sequence in sequences]
        right_Q = torch.tensor([one == other for one, other in zip(tally.likeliest, expected, strict=True)])
        log_likelihood_Q = torch.tensor(tally.log_likelihoods, dtype=torch.float64)
        return _Answers({ACC: list(tally.likeliest)}, {ACC: right_Q}, log_likelihood_Q)
    given: dict[str, list[Hashable]] = {ACC: [], ACC_NORM: []}
    of_gold, each = [], iter(tally.log_likelihoods)
    for question in task.questions:
        sums = [next(each) for _ in question.answers]
        of_gold.append(sums[question.gold])
        given[ACC].append(_largest(sums))
        pairs = zip(sums, question.answers, strict=True)
        given[ACC_NORM].append(_largest([value / len(answer) for value, answer in pairs]))
    right = {
        metric: torch.tensor([one == gold for one, gold in zip(chosen, golds, strict=True)])
        for metric, chosen in given.items()
    }
    return _Answers(given, right, torch.tensor(of_gold, dtype=torch.float64))


def _largest(values: list[float]) -> int | None:
    """Index of the largest, the first of equal ones; None, which is never right, where one is not a number."""
    return None if any(math.isnan(value) for value in values) else values.index(max(values))


def _mean(tasks: Sequence[_Result], metrics: Sequence[str]) -> _Result:
    def of(metric: str) -> Iterator[tuple[Resampled, Flips]]:
        for task in tasks:
            own = metric if metric in task.flips else ACC
            yield task.means[own], task.flips[own]

    means = {metric: Resampled.average([mean for mean, _ in of(metric)]) for metric in metrics}
    means[LOG_LIKELIHOOD] = Resampled.average([task.means[LOG_LIKELIHOOD] for task in tasks])
    return _Result(
        means,
        {metric: Flips.average([flips for _, flips in of(metric)]) for metric in metrics},
        sum(task.questions for task in tasks),
        sum(task.tokens for task in tasks),
        math.fsum(task.seconds for task in tasks),
    )


def _rows(task: str, kind: str, results: Mapping[str, _Result], metrics: Sequence[str]) -> Iterator[TaskRow]:
    base = results[BASELINE]
    for metric in metrics:
        for scheme, found in results.items():
            score, log_likelihood = found.means[metric], found.means[LOG_LIKELIHOOD]
            yield TaskRow(
                task=task,
                kind=kind,
                scheme=scheme,
                metric=metric,
                questions=found.questions,
                score=score.interval(),
                difference=score.minus(base.means[metric]),
                retained=score.share_of(base.means[metric]),
                flips=found.flips[metric],
                log_likelihood=log_likelihood.mean,
                log_likelihood_change=log_likelihood.minus(base.means[LOG_LIKELIHOOD]),
                # torch's, which overflows to infinity
                perplexity=float((-log_likelihood.means_B.new_tensor(log_likelihood.mean)).exp())
                if kind == LAST_WORDS
                else None,
                tokens=found.tokens,
                tokens_per_s=found.tokens / found.seconds,
            )
