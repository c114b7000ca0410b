"""tune_scheme: formats for each sync point and stage, bits spent where they help most, and proof on unseen text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.calibration.scheme_file import SchemeOrigin, TunedScheme
from megatron_lowbit.comm.presets import FINE_LAST
from megatron_lowbit.evaluation import EvaluationRow, evaluate
from megatron_lowbit.scheme_tuning_errors import format_errors
from megatron_lowbit.scheme_tuning_search import Candidate, Choice, Site, best_uniform, candidates, choose
from megatron_lowbit.scheme_tuning_sensitivity import sensitivities
from megatron_lowbit.weights import ModelWeights

COMPENSATED = ":predict:loop"
#: How often a KL limit is tried: what is measured differs from the sum of what each site was expected to add.
ATTEMPTS = 4
#: Below this share of its KL limit a scheme could be cheaper, and is tried again.
CLOSE = 0.85
#: Of the sequences to search with, so many measure the errors of formats: those vary little from text to text.
ERROR_SEQUENCES = 2
#: Of each sequence to search with: passes over more tell little more.
SEARCH_TOKENS = 256

Progress = Callable[[int, int], None]
#: Shows a step of the search by name, and what is done of it.
Steps = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Goal:
    """Least KL within `budget_bits`, wire bits in the mean over sync points and stages; or fewest bits within `max_kl`.

    Raises ValueError unless it is one of them, and positive.
    """

    budget_bits: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.budget_bits, self.max_kl) if value is not None]
        if len(given) != 1 or not 0 < given[0] < float("inf"):
            raise ValueError(
                f"tuning needs one goal: budget bits {self.budget_bits} or a KL limit {self.max_kl}, a positive number"
            )


@dataclass(frozen=True)
class SiteRow:
    """What was chosen at one sync point. error_share: of the whole expected KL."""

    name: str
    reduce_format: str
    gather_format: str
    reduce_bits: float
    gather_bits: float
    sensitivity: float
    error_share: float


@dataclass(frozen=True)
class Tuned:
    """The scheme, a row for each sync point, and the candidates on unseen text: the best with one format everywhere,
    the search's, and within a budget the best with one format but for a finer last point.

    is_uniform: formats of their own were not better, so the scheme has the same everywhere.
    """

    scheme: TunedScheme
    points: list[SiteRow]
    expected_kl: float
    rows: list[EvaluationRow]
    is_uniform: bool


def tune_scheme(
    weights: ModelWeights,
    calibration: CommCalibration,
    search: Sequence[Sequence[int]],
    unseen: Sequence[Sequence[int]],
    goal: Goal,
    steps: Steps,
    portable: bool = False,
    fast: bool = False,
    backend: str = "auto",
    name: str = "tuned",
    model: str = "",
    text: str = "",
    text_sha256: str = "",
) -> Tuned:
    """The best scheme found for `goal`; the same on all ranks.

    KL grows about with the squared error. So each format's error is measured at each sync point (`format_errors`), and
    what an error costs there by sending few points coarsely at a time (`sensitivities`); their product is what a format
    adds. The sum is least where every bit buys the same. portable: a scheme that needs partial sums alone.
    fast: without trellis-coded values, which take an encoder several times as long as code books.
    search, unseen: token sequences, the latter for the proof alone, beside the best scheme with one format everywhere.
    name, model, text, text_sha256: recorded in the scheme.
    Raises ValueError for one rank, and for a goal that no format reaches.
    """
    context, hidden = weights.context, weights.config.hidden_size
    if context.size == 1:
        raise ValueError("tuning a scheme needs at least 2 tensor-parallel ranks; pass --tp N or --virtual-tp N")
    context.together(lambda: calibration.check_fits(weights.fingerprint, context.size, "file"))
    options = "" if portable else COMPENSATED
    formats = candidates(hidden, fast)
    search = [sequence[:SEARCH_TOKENS] for sequence in search]
    # what compensates sends a row's root mean square along with the sum, where a norm follows
    extra = 8 / hidden if weights.config.post_norms and not portable else 0.0
    with steps("measuring formats (sequences)") as progress:
        few = search[:ERROR_SEQUENCES]
        errors = format_errors(weights, calibration, formats, portable, few, backend, progress)
    with steps("measuring sync points (passes)") as progress:
        sensitive = sensitivities(weights, calibration, options, formats, errors, search, backend, progress)
    damages = sensitive.damages(errors)
    trial = _Trial(weights, calibration, formats, damages, options, unseen, backend, extra, name, steps)
    chosen, rows = (
        trial.within_bits(goal.budget_bits) if goal.budget_bits is not None else trial.below(goal.max_kl or 0)
    )
    uniform_row, own_row = rows[0], next(row for row in rows if row.scheme == chosen.label)
    origin = SchemeOrigin(
        budget_bits=goal.budget_bits, max_kl=goal.max_kl, wire_bits=_mean_bits(own_row), kl=own_row.kl_mean,
        uniform=uniform_row.scheme, uniform_kl=uniform_row.kl_mean, model=model, text=text, text_sha256=text_sha256,
    )  # fmt: skip
    total = sum(damages[site][index] for site, index in chosen.choice.formats.items())
    points = []
    for point, sensitivity in sensitive.of_points.items():
        pair = [chosen.choice.formats[point, stage] for stage in (0, 1)]
        share = sum(damages[point, stage][index] for stage, index in enumerate(pair)) / max(total, 1e-30)
        first, second = (formats[index] for index in pair)
        points.append(SiteRow(point, first.name, second.name, first.bits, second.bits, sensitivity, share))
    return Tuned(replace(chosen.scheme, origin=origin), points, total, rows, chosen.is_uniform)


@dataclass(frozen=True)
class _Chosen:
    scheme: TunedScheme
    choice: Choice
    is_uniform: bool
    label: str  # of its row


class _Trial:
    """Candidates for a goal, evaluated on unseen text."""

    def __init__(
        self,
        weights: ModelWeights,
        calibration: CommCalibration,
        formats: Sequence[Candidate],
        damages: dict[Site, list[float]],
        options: str,
        unseen: Sequence[Sequence[int]],
        backend: str,
        extra: float,
        name: str,
        steps: Steps,
    ) -> None:
        self._weights, self._calibration, self._formats, self._damages = weights, calibration, formats, damages
        self._options, self._unseen, self._backend, self._extra = options, unseen, backend, extra
        self._name, self._steps = name, steps
        self._bits = [format_.bits for format_ in formats]

    def within_bits(self, budget: float) -> tuple[_Chosen, list[EvaluationRow]]:
        """The best of the best uniform scheme, the search's, and the uniform one with a finer last point; their rows.

        Sensitivities are measured, and noise in them may spend bits in vain where all points need about as many.
        """
        room = budget - self._extra
        trials = [
            self._chosen(best_uniform(self._damages, self._bits, room), True),
            self._chosen(choose(self._damages, self._bits, room), False),
        ]
        if (finer := self._finer_last(room)) is not None:
            trials.append(self._chosen(finer, False, "finer last point"))
        rows = self._evaluate(*trials)
        best = min(range(len(rows)), key=lambda at: rows[at].kl_mean)  # the first of equal ones
        return trials[best], rows

    def _finer_last(self, room: float) -> Choice | None:
        """One format everywhere but at the last point; None where the budget leaves none for the others."""
        last = self._weights.config.sync_points[-1]
        fine = next(at for at, format_ in enumerate(self._formats) if format_.name == FINE_LAST)
        others = {site: damages for site, damages in self._damages.items() if site[0] != last}
        sites, fine_bits = len(self._damages), (len(self._damages) - len(others)) * self._bits[fine]
        if (left := (room * sites - fine_bits) / len(others)) < min(self._bits):
            return None
        found = best_uniform(others, self._bits, left)
        formats = {site: found.formats.get(site, fine) for site in self._damages}
        damage = sum(self._damages[site][at] for site, at in formats.items())
        return Choice(formats, (found.mean_bits * len(others) + fine_bits) / sites, damage)

    def below(self, max_kl: float) -> tuple[_Chosen, list[EvaluationRow]]:
        """The cheapest whose measured KL is below; expectations are scaled by what was measured, and tried again."""
        best: tuple[_Chosen, list[EvaluationRow]] | None = None
        expected, lowest = CLOSE * max_kl, float("inf")
        for _ in range(ATTEMPTS):
            try:
                uniform = self._chosen(best_uniform(self._damages, self._bits, damage=expected), True)
                tuned = self._chosen(choose(self._damages, self._bits, damage=expected), False)
            except ValueError:
                break  # not even the finest formats are expected to do
            rows = self._evaluate(uniform, tuned)
            for each, row in zip((uniform, tuned), rows, strict=True):
                lowest = min(lowest, row.kl_mean)
                cheaper = best is None or each.choice.mean_bits < best[0].choice.mean_bits
                if row.kl_mean <= max_kl and cheaper:
                    best = each, rows
            measured = max(rows[1].kl_mean, 1e-12)
            if CLOSE * max_kl <= measured <= max_kl:
                break
            expected *= (1 + CLOSE) / 2 * max_kl / measured
        if best is None:
            raise ValueError(
                f"no scheme of 2 to 8 bits was found whose KL is below {max_kl:g} (the lowest measured: {lowest:.2g}); "
                "allow more, or name a budget of bits"
            )
        return best

    def _chosen(self, choice: Choice, is_uniform: bool, label: str = "") -> _Chosen:
        names = {site: self._formats[index].name for site, index in choice.formats.items()}
        points = dict.fromkeys(name for name, _ in names)
        if is_uniform:
            (base,) = set(names.values())
            scheme = self._scheme(base, {})
        else:
            pairs = {name: (names[name, 0], names[name, 1]) for name in points}
            values = list(pairs.values())
            # the commonest pair is the base, and need not be repeated
            common = max(values, key=values.count)
            own = {name: pair for name, pair in pairs.items() if pair != common}
            scheme = self._scheme("+".join(dict.fromkeys(common)), own)
        return _Chosen(scheme, choice, is_uniform, label or (scheme.base if is_uniform else self._name))

    def _scheme(self, base: str, own: dict[str, tuple[str, str]]) -> TunedScheme:
        nowhere = SchemeOrigin(None, None, 0.0, 0.0, "", 0.0, "", "", "")
        return TunedScheme(self._name, base + self._options, own, nowhere, self._calibration)

    def _evaluate(self, *trials: _Chosen) -> list[EvaluationRow]:
        with self._steps("proving it on unseen text (passes)") as progress:
            schemes = [replace(trial.scheme, name=trial.label) for trial in trials]
            return evaluate(self._weights, schemes, self._unseen, self._calibration, progress, self._backend)


def _mean_bits(row: EvaluationRow) -> float:
    assert row.gather_bits_per_value is not None
    return (row.reduce_bits_per_value + row.gather_bits_per_value) / 2
