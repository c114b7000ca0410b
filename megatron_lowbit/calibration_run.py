"""calibrate: runs a model with observing sync points over text and returns what they saw."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from megatron_lowbit.calibration.artifact import CommCalibration, SyncPointStatistics
from megatron_lowbit.calibration.moments import SyncPointMoments
from megatron_lowbit.calibration.observer import ObservingAllReduce, RestObservingAllReduce
from megatron_lowbit.calibration.predictor_fit import MomentObserver, fit_predictor
from megatron_lowbit.calibration.step_observer import BINS, BITS, StepObserver
from megatron_lowbit.comm.all_reduce import AllReduce, build_all_reduce
from megatron_lowbit.comm.compensation import CompensatedAllReduce
from megatron_lowbit.comm.constants import NO_CONSTANTS
from megatron_lowbit.comm.predictor import Predictor
from megatron_lowbit.comm.schemes import PREDICTOR_RANK, parse_scheme
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.models.decoder import Decoder
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.weights import ModelWeights

PURPOSE = "calibration"
#: Sequences that predictors are not fitted to: what they leave is measured on these, one in so many.
HELD_OUT = 4
MEMORY_NBYTES = 1 << 30

Progress = Callable[[int, int], None]


def calibrate(
    weights: ModelWeights,
    sequences: Sequence[Sequence[int]],
    text_sha256: str,
    progress: Progress | None = None,
    predictor_rank: int = PREDICTOR_RANK,
    memory_nbytes: int = MEMORY_NBYTES,
) -> CommCalibration:
    """Statistics of every sync point over token `sequences`, the same on all ranks.

    text_sha256: of the text they came from, recorded for the reader. progress: called with (done, total) forward
    passes. predictor_rank: of the predictors that are fitted, 0 for none. memory_nbytes: for the second moments that
    they are fitted from, a process; where all sync points need more, the text is run once for each group that fits.
    """
    context, hidden = weights.context, weights.config.hidden_size
    if context.size == 1:
        raise ValueError("calibration needs at least 2 tensor-parallel ranks; pass --tp N or --virtual-tp N")
    if not sequences:
        raise ValueError("calibration needs at least one sequence; use a longer text")
    groups = [weights.config.sync_points]
    if predictor_rank:
        groups = list(_groups(groups[0], hidden, len(context.local_ranks), memory_nbytes))
    held_out = sequences[::HELD_OUT] if predictor_rank else []
    run = _Run(weights, len(groups) * len(sequences) + len(held_out), progress)
    ranges: dict[str, ObservingAllReduce] = {}
    predictors: dict[str, Predictor] = {}
    fitted: dict[str, _Fitted] = {}
    for group in groups:
        moments = {name: MomentObserver() for name in group} if predictor_rank else {}
        seen = run.observe(sequences, moments)
        for name, ranges_of_point in seen.items():
            context.together(functools.partial(_check_finite, name, ranges_of_point))
        ranges = ranges or seen
        for name, observer in moments.items():
            fitted[name] = _fitted(context, observer, seen[name])
            predictors[name] = _fit(context, observer, predictor_rank)
    rests = run.observe_rests(held_out, predictors)
    points = {
        name: _statistics(context, seen, predictors.get(name), rests.get(name), fitted.get(name))
        for name, seen in ranges.items()
    }
    return CommCalibration(
        fingerprint=weights.fingerprint,
        tp=context.size,
        hidden=hidden,
        sequences=len(sequences),
        length=max(len(sequence) for sequence in sequences),
        text_sha256=text_sha256,
        sync_points=points,
    )


def text_digest(text: str) -> str:
    """Hex SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


class _Run:
    """Passes over text with observers at all sync points."""

    def __init__(self, weights: ModelWeights, total: int, progress: Progress | None) -> None:
        self._weights, self._total, self._progress = weights, total, progress
        self._done = 0

    def observe(
        self, sequences: Sequence[Sequence[int]], moments: dict[str, MomentObserver]
    ) -> dict[str, ObservingAllReduce]:
        """Ranges over all sequences; second moments, where given, over those that are not held out."""
        found: dict[str, ObservingAllReduce] = {}

        def observer(name: str) -> ObservingAllReduce:
            found[name] = ObservingAllReduce(self._exact(), moments.get(name))
            return found[name]

        model = self._weights.build(observer)
        for number, sequence in enumerate(sequences):
            for each in found.values():
                each.fits = number % HELD_OUT > 0 or len(sequences) == 1
            self._forward(model, sequence)
        return found

    def observe_rests(
        self, sequences: Sequence[Sequence[int]], predictors: dict[str, Predictor]
    ) -> dict[str, RestObservingAllReduce]:
        """What predictors leave of sequences that they were not fitted to."""
        found: dict[str, RestObservingAllReduce] = {}
        if not sequences:
            return found
        context = self._weights.context

        def observer(name: str) -> RestObservingAllReduce:
            predictor = predictors[name].to(context.device)
            found[name] = RestObservingAllReduce(self._exact(), list(context.local_ranks), predictor)
            return found[name]

        model = self._weights.build(observer)
        for sequence in sequences:
            self._forward(model, sequence)
        return found

    def _forward(self, model: Decoder, sequence: Sequence[int]) -> None:
        model(TokenBatch.prompts([sequence], self._weights.context.device))
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _exact(self) -> AllReduce:
        return _exact_all_reduce(self._weights)


def _exact_all_reduce(weights: ModelWeights) -> AllReduce:
    scheme = parse_scheme("exact").for_dtype(weights.dtype)
    collective = build_all_reduce(weights.context, scheme, weights.config.hidden_size, NO_CONSTANTS)
    assert not isinstance(collective, CompensatedAllReduce)
    return collective


def _groups(names: Sequence[str], hidden: int, local_ranks: int, memory_nbytes: int) -> Iterator[list[str]]:
    """Sync points whose second moments fit into the memory together; one at least."""
    point_nbytes = 4 * (hidden + 1) * (hidden + 1 + local_ranks * hidden) + 4 * hidden * BINS * (local_ranks + 1)
    count = max(1, memory_nbytes // point_nbytes)
    for first in range(0, len(names), count):
        yield list(names[first : first + count])


def _fit(context: ParallelContext, observer: MomentObserver, rank: int) -> Predictor:
    """Rank 0 fits for all: eigenvectors on other hardware could differ in a bit, and replicas with them."""
    inputs_II, cross_LIH = observer.inputs_II, observer.cross_LIH
    assert inputs_II is not None and cross_LIH is not None
    observer.inputs_II = observer.cross_LIH = None  # the memory is needed for the next group
    if context.virtual:
        return fit_predictor(inputs_II.cpu(), cross_LIH.cpu(), observer.weight, rank)
    cross_RIH = context.all_gather(cross_LIH[0], PURPOSE)
    fitted = context.together(
        lambda: fit_predictor(inputs_II.cpu(), cross_RIH.cpu(), observer.weight, rank) if context.is_first else None
    )
    shapes = context.broadcast_json(
        None if fitted is None else {name: list(tensor.shape) for name, tensor in fitted.tensors().items()}
    )
    tensors = {}
    for name, shape in shapes.items():
        dtype = torch.int8 if name in ("first_HK", "second_RKH") else torch.float32
        own = torch.zeros(shape, dtype=dtype) if fitted is None else fitted.tensors()[name]
        tensors[name] = context.all_gather(own.to(context.device), PURPOSE)[0].cpu()
    return Predictor(**tensors)


class _Fitted(NamedTuple):
    """FP32, of all ranks: weighted means `[R, H]`, and steps of partials `[7, R, H]` and of the sum `[7, H]`."""

    partial_mean: torch.Tensor | None = None
    partial_step: torch.Tensor | None = None
    sum_step: torch.Tensor | None = None


def _fitted(context: ParallelContext, observer: MomentObserver, seen: ObservingAllReduce) -> _Fitted:
    assert observer.cross_LIH is not None
    # the constant 1 among the inputs summed the weighted partials up
    mean_LH = observer.cross_LIH[:, -1] / observer.weight
    step_BLH, sum_step_BH = seen.partial_steps.steps(), seen.sum_steps.steps()[:, 0]
    seen.partial_steps = seen.sum_steps = StepObserver()  # the memory is needed for the next group
    if not context.virtual:  # each rank saw its own partial only
        rows = context.all_gather(torch.cat((mean_LH, step_BLH[:, 0], sum_step_BH)), PURPOSE)
        mean_LH, step_RBH, sum_step_RBH = rows.split((1, len(BITS), len(BITS)), dim=1)
        mean_LH, step_BLH = mean_LH[:, 0], step_RBH.transpose(0, 1).contiguous()
        # GPUs count in no fixed order, so steps of the sum could differ from rank to rank: the first rank's are taken
        sum_step_BH = sum_step_RBH[0]
    return _Fitted(mean_LH.cpu(), step_BLH.cpu(), sum_step_BH.cpu())


def _statistics(
    context: ParallelContext,
    seen: ObservingAllReduce,
    predictor: Predictor | None,
    rest: RestObservingAllReduce | None,
    fitted: _Fitted | None,
) -> SyncPointStatistics:
    partial_min, partial_max = seen.partial.minimum, seen.partial.maximum
    sum_min, sum_max = seen.sum.minimum, seen.sum.maximum
    assert partial_min is not None and partial_max is not None and sum_min is not None and sum_max is not None
    partial_rms, sum_rms, ratio = seen.partial_rms.rms, seen.sum_rms.rms[0], seen.ratio.factor
    if rest is None or rest.after >= rest.before:  # on unseen text it does not help
        predictor, rest_partial_rms, rest_sum_rms = None, partial_rms, sum_rms
    else:
        rest_partial_rms, rest_sum_rms = rest.partial_rms.rms, rest.sum_rms.rms[0]
    if not context.virtual:  # each rank saw its own partial only
        rows = torch.cat((partial_min, partial_max, partial_rms, rest_partial_rms, ratio.expand_as(partial_rms)))
        gathered = context.all_gather(rows, PURPOSE).unbind(1)
        partial_min, partial_max, partial_rms, rest_partial_rms = gathered[:4]
        ratio = gathered[4][:, 0]
    moments = SyncPointMoments(
        partial_rms.cpu(), sum_rms.cpu(), rest_partial_rms.cpu(), rest_sum_rms.cpu(), ratio.cpu(), predictor,
        *(fitted or _Fitted()),
    )  # fmt: skip
    return SyncPointStatistics(
        partial_min.cpu(), partial_max.cpu(), sum_min.flatten().cpu(), sum_max.flatten().cpu(), moments
    )


def _check_finite(name: str, seen: ObservingAllReduce) -> None:
    for tensor in (seen.partial.minimum, seen.partial.maximum):
        assert tensor is not None
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"sync point {name} produced values that are not finite during calibration; the checkpoint is damaged "
                "or its activations overflow this dtype"
            )
