"""measure: everything a user needs to choose a scheme for one model, as flat rows; `part` says what each is about."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.calibration.scheme_file import TunedScheme
from megatron_lowbit.comm.schemes import CommScheme, parse_scheme
from megatron_lowbit.evaluation import DecodePath, evaluate
from megatron_lowbit.quality_report_generation import continuations, generation_row
from megatron_lowbit.quality_report_layers import sync_point_errors
from megatron_lowbit.quality_report_outliers import outlier_rows, overlap_rows
from megatron_lowbit.quality_report_statistics import ScoreBook
from megatron_lowbit.quality_report_verdict import verdict_rows
from megatron_lowbit.weights import ModelWeights

#: What can be left out.
PARTS = ("quality", "lengths", "decode", "layers", "outliers", "generation")
#: Borders of the ranges of positions that are looked at apart.
POSITION_BORDERS = (0, 16, 64, 256, 512, 1024, 2048, 4096, 8192)

Rows = list[dict[str, Any]]
Windows = list[list[int]]
#: Up to so many windows of a length, from the text.
WindowMaker = Callable[[int, int], Windows]
#: Opens a progress bar with this title, to be called with (done, total).
BarMaker = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class ReportSettings:
    """How much is measured.

    windows, length: of the main evaluation. lengths: others to evaluate, with as many tokens in all, where the model
    and the text have room. decode_batches: sequences at once; decode_prompt: tokens before the first decoded one;
    decode_positions: decoded in all, at least one a sequence. layer_windows: for errors at sync points and for tokens'
    outliers. prompts, prompt_tokens, new_tokens: of the greedy continuations.
    """

    windows: int = 32
    length: int = 512
    lengths: tuple[int, ...] = (128, 2048)
    decode_batches: tuple[int, ...] = (1, 32)
    decode_prompt: int = 63
    decode_positions: int = 128
    layer_windows: int = 2
    prompts: int = 50
    prompt_tokens: int = 32
    new_tokens: int = 128
    parts: frozenset[str] = field(default=frozenset(PARTS))

    def __post_init__(self) -> None:
        unknown = sorted(self.parts - set(PARTS))
        if unknown or not self.parts:
            raise ValueError(f"parts of a report: {', '.join(unknown) or 'none'}; allowed: {', '.join(PARTS)}")


@dataclass(frozen=True)
class _Scheme:
    """What was asked for, and what it comes to."""

    given: CommScheme | TunedScheme
    calibration: CommCalibration | None

    @property
    def scheme(self) -> CommScheme:
        return self.given.scheme if isinstance(self.given, TunedScheme) else self.given


@dataclass(frozen=True)
class Report:
    """Measures part by part. All ranks call it alike and get the same rows."""

    weights: ModelWeights
    schemes: Sequence[CommScheme | TunedScheme]
    calibration: CommCalibration | None
    windows: WindowMaker
    end_tokens: Collection[int]
    settings: ReportSettings
    bar: BarMaker
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.weights.context.size == 1:
            raise ValueError("a report compares what ranks send each other: pass --tp N or --virtual-tp N, N >= 2")

    def rows(self) -> Rows:
        """Those of all parts that were asked for, verdicts first."""
        steps = {
            "quality": self._quality,
            "lengths": self._lengths,
            "decode": self._decode,
            "layers": self._layers,
            "outliers": self._outliers,
            "generation": self._generation,
        }
        rows = [row for part, step in steps.items() if part in self.settings.parts for row in step()]
        return [*verdict_rows(rows), *rows]

    @property
    def _resolved(self) -> list[_Scheme]:
        return [
            _Scheme(given, given.calibration if isinstance(given, TunedScheme) else self.calibration)
            for given in self.schemes
        ]

    def _evaluate(
        self, windows: Windows, title: str, decode: DecodePath | None = None
    ) -> tuple[ScoreBook, dict[str, Any]]:
        """Scores of every position, and `evaluate`'s rows by scheme."""
        book = ScoreBook()
        with self.bar(title) as progress:
            rows = evaluate(
                self.weights, self.schemes, windows, self.calibration, progress, self.backend, decode, book.add
            )
        return book, {row.scheme: row for row in rows}

    def _quality(self) -> Rows:
        windows = self.windows(self.settings.windows, self.settings.length)
        book, evaluated = self._evaluate(windows, "quality (passes)")
        rows: Rows = []
        for name, row in evaluated.items():
            bits = [row.reduce_bits_per_value, row.gather_bits_per_value]
            sent = [value for value in bits if value is not None]
            rows.append(
                {
                    "part": "quality",
                    "scheme": name,
                    "stages": row.stages,
                    "reduce_bits_per_value": bits[0],
                    "gather_bits_per_value": bits[1],
                    "mean_bits_per_value": sum(sent) / len(sent),
                    "sent_nbytes_per_token_per_rank": row.sent_nbytes_per_token_per_rank,
                    "perplexity": row.perplexity,
                    **book.summary(name),
                    "saturated_share": row.saturated_share,
                    "non_finite": row.non_finite,
                }
            )
        last = self.settings.length - 1  # the last position predicts what nobody knows
        borders = [border for border in POSITION_BORDERS if border < last] + [last]
        for name in evaluated:
            for first, end in pairwise(borders):
                at = {"part": "position", "scheme": name, "first": first, "last": end - 1}
                rows.append(at | book.summary(name, range(first, end)))
        if "lengths" in self.settings.parts:
            rows += _length_rows(book, evaluated, self.settings.length)
        return rows

    def _lengths(self) -> Rows:
        settings, limit = self.settings, self.weights.config.max_position
        tokens = settings.windows * settings.length
        rows: Rows = []
        # the main length is the business of `quality`
        others = {*settings.lengths} - {settings.length} if "quality" in settings.parts else {*settings.lengths}
        for length in sorted(others):
            if length <= limit:
                windows = self.windows(max(2, tokens // length), length)
                rows += _length_rows(*self._evaluate(windows, f"windows of {length} (passes)"), length)
        return rows

    def _decode(self) -> Rows:
        settings = self.settings
        rows: Rows = []
        for batch in settings.decode_batches:
            # one sequence at a time: a few of them; many at once: as few steps
            sequences = max(batch, 4)
            decode = DecodePath(batch, max(1, settings.decode_positions // sequences))
            windows = self.windows(sequences, settings.decode_prompt + decode.tokens + 1)
            windows = windows[: len(windows) - len(windows) % batch]
            scored = range(settings.decode_prompt, settings.decode_prompt + decode.tokens)
            title = f"decoding, {batch} at once (passes)"
            decoded, evaluated = self._evaluate(windows, title, decode)
            prefilled, _ = self._evaluate(windows, "the same positions in prefill (passes)")
            for name in evaluated:
                prefill = prefilled.summary(name, scored)
                beside = {f"prefill_{key}": prefill[key] for key in ("kl", "top1_agreement")}
                at = {"part": "decode", "scheme": name, "batch": batch, "first": scored.start, "last": scored.stop - 1}
                rows.append(at | decoded.summary(name) | beside)
        return rows

    def _layers(self) -> Rows:
        windows = self.windows(self.settings.layer_windows, self.settings.length)
        rows: Rows = []
        with self.bar("errors at sync points (passes)") as progress:
            tick = _Ticks(progress, len(windows) * len(self.schemes))
            for each in self._resolved:
                rows += sync_point_errors(self.weights, each.scheme, each.calibration, windows, tick, self.backend)
        return rows

    def _outliers(self) -> Rows:
        calibration = next((each.calibration for each in self._resolved if each.calibration is not None), None)
        if calibration is None:
            return []
        calibration.check_fits(self.weights.fingerprint, self.weights.context.size, "file")
        windows = self.windows(self.settings.layer_windows, self.settings.length)
        with self.bar("outliers of tokens (passes)") as progress:
            tick = _Ticks(progress, len(windows))
            overlaps = overlap_rows(self.weights, calibration, windows, tick, self.backend)
        return [*outlier_rows(calibration, self.weights.config.sync_points), *overlaps]

    def _generation(self) -> Rows:
        settings = self.settings
        prompts = self.windows(settings.prompts, settings.prompt_tokens)
        exact = _Scheme(parse_scheme("exact"), None)
        others = [each for each in self._resolved if each.scheme.name != "exact"]
        written: dict[str, list[list[int]]] = {}
        with self.bar("greedy texts (steps)") as progress:
            tick = _Ticks(progress, settings.new_tokens * (1 + len(others)))
            for each in (exact, *others):
                written[each.scheme.name] = continuations(
                    self.weights, each.scheme, each.calibration, prompts, settings.new_tokens, self.end_tokens, tick,
                    self.backend,
                )  # fmt: skip
        return [
            generation_row(each.scheme.name, written["exact"], written[each.scheme.name], settings.new_tokens)
            for each in others
        ]


def _length_rows(book: ScoreBook, schemes: Iterable[str], length: int) -> Rows:
    return [{"part": "length", "scheme": name, "length": length} | book.summary(name) for name in schemes]


class _Ticks:
    """Counts passes for a bar."""

    def __init__(self, progress: Callable[[int, int], None], total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self) -> None:
        self._done += 1
        self._progress(self._done, self._total)
