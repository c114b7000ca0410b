"""sensitivities: what an error at a sync point costs in KL divergence, measured by sending a few of them coarsely."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.comm.presets import SCALED
from megatron_lowbit.comm.schemes import CommScheme, PointFormats, parse_scheme
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.models.decoder import Decoder
from megatron_lowbit.scheme_tuning_search import Candidate, Site
from megatron_lowbit.scoring import Reference, score
from megatron_lowbit.weights import ModelWeights

#: Formats of the sync points in question (the first of these that is a candidate), and of all others meanwhile.
COARSE, FINE = (f"tc3-g64-{SCALED}", f"lm3-g64-{SCALED}"), f"int8-g64-{SCALED}"
#: Sync points are taken together, neighbours first, where there are more than so many.
MAX_GROUPS = 64
#: What the exact predictions of all sequences may occupy, a process; fewer positions are scored where they need more.
MEMORY_NBYTES = 1 << 29
#: A group that costs hardly anything still counts for this share of the mean: what was measured has an error.
SMALLEST_SHARE = 0.02


@dataclass(frozen=True)
class Sensitivities:
    """KL (nats a token) for a unit of relative squared error, by sync point; floor: KL where all points are fine."""

    of_points: dict[str, float]
    floor: float

    def damages(self, errors: Mapping[Site, Sequence[float]]) -> dict[Site, list[float]]:
        """KL that each format is expected to add at each site."""
        return {(name, stage): [self.of_points[name] * e for e in errors[name, stage]] for name, stage in errors}


def sensitivities(
    weights: ModelWeights,
    calibration: CommCalibration,
    options: str,
    formats: Sequence[Candidate],
    errors: Mapping[Site, Sequence[float]],
    sequences: Sequence[Sequence[int]],
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivities:
    """One forward pass a group of sync points and sequence; the same on all ranks.

    options: of the scheme that is searched, such as ":predict:loop". With the loop closed, errors are made up for at
    the next sync point, and count there for less than without. errors: as `format_errors` gave them, for `formats`.
    """
    names = list(dict.fromkeys(name for name, _ in errors))
    size = -(-len(names) // MAX_GROUPS)
    groups = [names[first : first + size] for first in range(0, len(names), size)]
    judge = _Judge(weights, calibration, sequences, backend, (len(groups) + 2) * len(sequences), progress)
    base = replace(parse_scheme(FINE + options), name="fine")
    floor = judge.kl(base)
    index = next(index for index, format_ in enumerate(formats) if format_.name in COARSE)
    coarse = formats[index].wire
    fine_index = next(index for index, format_ in enumerate(formats) if format_.name == FINE)
    per_group = []
    for group in groups:
        points = tuple(PointFormats(name, coarse, coarse) for name in group)
        more = sum(errors[name, stage][index] - errors[name, stage][fine_index] for name in group for stage in (0, 1))
        added = judge.kl(replace(base, name="coarse", points=points)) - floor
        per_group.append(added / max(more, 1e-30))
    least = SMALLEST_SHARE * max(sum(per_group) / len(per_group), 1e-30)
    of_groups = zip(groups, per_group, strict=True)
    return Sensitivities({name: max(each, least) for group, each in of_groups for name in group}, floor)


class _Judge:
    """Mean KL of schemes over the same positions of the same sequences."""

    def __init__(
        self,
        weights: ModelWeights,
        calibration: CommCalibration,
        sequences: Sequence[Sequence[int]],
        backend: str,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._weights, self._calibration, self._sequences, self._backend = weights, calibration, sequences, backend
        self._total, self._progress, self._done = total, progress, 0
        # two FP32 numbers a token of the vocabulary
        position_nbytes = 8 * -(-weights.config.vocab_size // weights.context.shard[1]) * len(sequences)
        self._positions = max(1, MEMORY_NBYTES // position_nbytes)
        self._references: list[Reference | None] = [None] * len(sequences)
        self.kl(parse_scheme("exact"))

    def kl(self, scheme: CommScheme) -> float:
        """Nats a token against the exact sum."""
        model = self._weights.build_with_scheme(scheme, self._calibration, self._backend)
        return sum(self._of_sequence(model, number) for number in range(len(self._sequences))) / len(self._sequences)

    def _of_sequence(self, model: Decoder, number: int) -> float:
        context, sequence = self._weights.context, self._sequences[number]
        hidden_TH = model(TokenBatch.prompts([sequence], context.device))[:-1]
        step = -(-len(hidden_TH) // self._positions)
        logits_NV = model.head.precise_logits(hidden_TH[::step].contiguous())
        asked = [(number, at, sequence[at + 1]) for at in range(0, len(sequence) - 1, step)]
        reference = self._references[number]
        self._references[number], scores = score(context, logits_NV, model.head.start, asked, reference)
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
        return float(scores.kl_N.mean())
