"""CommScheme: what one all-reduce puts on the wire, by name. SCHEMES is the table of the usual names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_lowbit.comm.format_names import GRAMMAR, OutlierChoice, parse_format
from megatron_lowbit.comm.presets import PRESETS
from megatron_lowbit.comm.wire_format import WireFormat

ONE_STAGE = "one-stage"
#: Where a name says `predict` alone.
PREDICTOR_RANK = 64
#: What the first and the last sync point of any model are called in `PointFormats`.
FIRST, LAST = "first", "last"


@dataclass(frozen=True)
class PointFormats:
    """The formats of one sync point, where they differ from the scheme's own. name: its path, or FIRST or LAST."""

    name: str
    reduce_stage: WireFormat
    gather_stage: WireFormat


@dataclass(frozen=True)
class CommScheme:
    """A named pair of wire formats.

    reduce_stage: format of the partial sums on their way to the token's owner (two-stage) or to everybody (one-stage).
    gather_stage: format of the sum on its way back; None makes the scheme one-stage.
    loop: what encoders miss is made up for at the next sync point. predictor_rank: of the calibrated map that foretells
        partial sums from the block's input; 0 for none. Schemes with either need more than partial sums: the residual,
        the block's input, a state of the pass (`portable` is False).
    centred: the calibrated mean of every rank's partials is taken out before they travel (a predictor does that too).
    points: formats of single sync points, where they are not these; a path goes before FIRST, and that before LAST.
    outlier_choice: how the BF16 features are found: from calibrated ranges, or at random (seeded) as a baseline.

    Raises ValueError where the stages of a sync point set different features apart: one index set serves both.
    """

    name: str
    reduce_stage: WireFormat
    gather_stage: WireFormat | None
    outlier_choice: OutlierChoice = "none"
    seed: int = 0
    loop: bool = False
    predictor_rank: int = 0
    points: tuple[PointFormats, ...] = ()
    centred: bool = False

    def __post_init__(self) -> None:
        if self.centred and (self.predictor_rank or self.gather_stage is None):
            raise ValueError(
                f"scheme {self.name!r}: 'centred' goes with two stages, and without a predictor, which has means too"
            )
        if self.predictor_rank < 0 or ((self.predictor_rank or self.loop) and self.gather_stage is None):
            raise ValueError(
                f"scheme {self.name!r}: the loop and a predictor (of rank {self.predictor_rank}) go with two stages "
                "and a rank of at least 1"
            )
        names = [point.name for point in self.points]
        if len(set(names)) < len(names) or (names and self.gather_stage is None):
            raise ValueError(f"scheme {self.name!r}: formats of sync points go with two stages, each point named once")
        everywhere: tuple[CommScheme | PointFormats, ...] = (self, *self.points)
        for stages in everywhere:
            formats = [wire for wire in (stages.reduce_stage, stages.gather_stage) if wire is not None]
            divisors = {wire.outlier_divisor for wire in formats} - {0}
            if len(divisors) > 1 or (divisors and self.outlier_choice == "none"):
                raise ValueError(
                    f"scheme {self.name!r}: outlier_divisor {sorted(divisors)} of its stages with outlier_choice "
                    f"{self.outlier_choice!r}; allowed: the same divisor in both, and 'calibrated' or 'random'"
                )

    @property
    def stages(self) -> int:
        return 1 if self.gather_stage is None else 2

    @property
    def has_static_stage(self) -> bool:
        """True where a stage has static scales."""
        return any(wire.is_static for wire in self.formats)

    @property
    def portable(self) -> bool:
        """True where partial sums are all that the collective needs, so that any engine can use it."""
        return not (self.loop or self.predictor_rank or self.centred)

    @property
    def needs_calibration(self) -> bool:
        return (
            self.has_static_stage
            or not self.portable
            or (self.outlier_choice == "calibrated" and any(wire.outlier_divisor for wire in self.formats))
        )

    def at(self, name: str, names: Sequence[str]) -> CommScheme:
        """The scheme of the sync point `name`, the same formats everywhere; names: of all, in the order of a pass."""
        if not self.points:
            return self
        called = [name, *([FIRST] if name == names[0] else []), *([LAST] if name == names[-1] else [])]
        own = {point.name: point for point in self.points}
        point = next((own[each] for each in called if each in own), self)
        return replace(self, reduce_stage=point.reduce_stage, gather_stage=point.gather_stage, points=())

    def wire_bits_per_value(self, hidden: int, names: Sequence[str], post_norms: bool) -> tuple[float, float | None]:
        """Bits that really travel in each stage, in the mean over the sync points `names`; None for no second stage.

        names: in the order of a pass. post_norms: norms stand between sums and residual: what compensates sends a row's
        root mean square (16 bits).
        """
        schemes = [self.at(name, names) for name in names]
        extra = 16 / hidden if post_norms and not self.portable else 0.0
        reduce = sum(scheme.reduce_stage.wire_bits_per_value(hidden) for scheme in schemes) / len(schemes)
        if self.gather_stage is None:
            return reduce, None
        gathers = [scheme.gather_stage for scheme in schemes if scheme.gather_stage is not None]
        return reduce, sum(wire.wire_bits_per_value(hidden) for wire in gathers) / len(gathers) + extra

    def outlier_count(self, hidden: int) -> int:
        """K, the features that travel as BF16 in the stages that set any apart."""
        return max(wire.outlier_count(hidden) for wire in self.formats)

    def for_dtype(self, dtype: torch.dtype) -> CommScheme:
        """`exact` sends partial sums in the model's own dtype, which loses nothing; other schemes stay as they are."""
        if self.name.split(":")[0].split("+")[0] == "exact" and dtype == torch.bfloat16:
            return replace(self, reduce_stage=WireFormat(16))
        return self

    def sent_nbytes_per_token(self, hidden: int, ranks: int) -> float:
        """Mean bytes a rank sends for one token at one sync point.

        Two-stage: all but the owner send one row, the owner sends one row to all others. One-stage: everybody sends
        its row to all others.
        """
        reduce_row = self.reduce_stage.packet_layout(hidden).row_nbytes
        if self.gather_stage is None:
            return float((ranks - 1) * reduce_row)
        gather_row = self.gather_stage.packet_layout(hidden).row_nbytes
        return (ranks - 1) * (reduce_row + gather_row) / ranks

    @property
    def formats(self) -> list[WireFormat]:
        """Of all stages and sync points."""
        both = [self.reduce_stage] if self.gather_stage is None else [self.reduce_stage, self.gather_stage]
        return both + [wire for point in self.points for wire in (point.reduce_stage, point.gather_stage)]


def _two_stage(name: str) -> CommScheme:
    wire, choice = parse_format(name)
    return CommScheme(name, wire, wire, choice)


SCHEMES: dict[str, CommScheme] = {
    name: _two_stage(name)
    for name in (
        "exact",  # unrounded FP32 sum in rank order: the reference of every quality number
        *("bf16", "int8-group", "int4-group"),
        *("int4", "int4-random", "int4-outlier"),  # the paper's two baselines, and the paper
    )
}


def parse_scheme(text: str) -> CommScheme:
    """Scheme of a name with options behind colons: `int4-outlier`, `int3-g32:one-stage`, `int4-random:seed=2`.

    `int4-g64+int8-g128` takes a format for each stage, reduce and gather. See `format_names` for the names; those of
    PRESETS stand for others.
    Raises ValueError for an unknown name or option.
    """
    base, *options = PRESETS.get(text, text).split(":")
    known = f"known: {', '.join((*PRESETS, *SCHEMES))}, and others like them: {GRAMMAR}"
    try:
        scheme = CommScheme(text, *_parse_stages(base))
    except ValueError as error:
        raise ValueError(f"unknown scheme {text!r}: {error}; {known}") from error
    for option in options:
        changed = _with_option(scheme, option, one_format="+" not in base)
        if changed is None:
            raise ValueError(
                f"scheme {text!r}: unknown option {option!r}; allowed: '{ONE_STAGE}' for schemes with one format and, "
                "for those that end in -random like int4-random, 'seed=N'; with two stages 'loop', 'predict', "
                f"'predict=RANK' or 'centred', and '{FIRST}=FORMAT' and '{LAST}=FORMAT' for the model's first and last "
                "sync point; each of them once"
            )
        scheme = changed
    return scheme


def _parse_stages(text: str) -> tuple[WireFormat, WireFormat, OutlierChoice]:
    """`FORMAT` or `REDUCE+GATHER`. Raises ValueError."""
    formats = [parse_format(name) for name in text.split("+")]
    if len(formats) > 2:
        raise ValueError(f"{len(formats)} formats; one for both stages, or REDUCE+GATHER")
    (reduce_stage, _), (gather_stage, _) = formats[0], formats[-1]
    choices = {choice for _, choice in formats if choice != "none"}
    if len(choices) > 1:
        raise ValueError("one stage has '-outlier' and the other '-random'; one set of features serves both")
    return reduce_stage, gather_stage, choices.pop() if choices else "none"


def _with_option(scheme: CommScheme, option: str, one_format: bool) -> CommScheme | None:
    """None where there is no such option, where it does not go with the scheme, or the scheme has it already."""
    key, _, value = option.partition("=")
    number = int(value) if value.isdecimal() else 0
    if option == "loop" and not scheme.loop:
        return replace(scheme, loop=True)
    if option == "centred" and not scheme.centred:
        return replace(scheme, centred=True)
    if key == "predict" and (number or option == key) and not scheme.predictor_rank:
        return replace(scheme, predictor_rank=number or PREDICTOR_RANK)
    if key in (FIRST, LAST) and value and key not in [point.name for point in scheme.points]:
        try:
            reduce_stage, gather_stage, choice = _parse_stages(value)
            if choice not in ("none", scheme.outlier_choice):
                raise ValueError(f"its BF16 features are {choice} ones, those of the scheme {scheme.outlier_choice}")
            return replace(scheme, points=(*scheme.points, PointFormats(key, reduce_stage, gather_stage)))
        except ValueError as error:
            raise ValueError(f"scheme {scheme.name!r}: option {option!r}: {error}") from error
    if option == ONE_STAGE and one_format:
        return replace(scheme, gather_stage=None)
    if key == "seed" and value.isdecimal() and scheme.outlier_choice == "random":
        return replace(scheme, seed=number)
    return None
