"""TunedScheme: a scheme with formats of its own at each sync point, in one file with the calibration it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.comm.format_names import parse_format
from megatron_lowbit.comm.schemes import CommScheme, PointFormats, parse_scheme

#: What tells a scheme file from the name of a scheme, which has no dot.
SUFFIX = ".safetensors"
#: Metadata of the calibration file that make it a scheme file.
KEY = "scheme"
AGAIN = "make it again with `megatron-lowbit tune-scheme`"


@dataclass(frozen=True)
class SchemeOrigin:
    """How a scheme was found, for the reader.

    budget_bits, max_kl: what was asked for, one of them. wire_bits: in the mean over sync points and stages. kl,
    uniform_kl: nats a token against the exact sum, measured on text that the search did not see, of this scheme and of
    `uniform`, the best that has the same formats everywhere.
    """

    budget_bits: float | None
    max_kl: float | None
    wire_bits: float
    kl: float
    uniform: str
    uniform_kl: float
    model: str
    text: str
    text_sha256: str


@dataclass(frozen=True)
class TunedScheme:
    """What `tune-scheme` finds; every function that takes a scheme and a calibration is given these two.

    name: shown in tables. base: a name for `parse_scheme`, two-stage. formats: names of the (reduce, gather) formats of
    sync points that do not use the base's.
    Raises ValueError where these do not make a scheme, or name sync points that the calibration does not know.
    """

    name: str
    base: str
    formats: Mapping[str, tuple[str, str]]
    origin: SchemeOrigin
    calibration: CommCalibration

    def __post_init__(self) -> None:
        unknown = sorted(set(self.formats) - set(self.calibration.sync_points))
        if unknown:
            raise ValueError(
                f"it has formats of {unknown[0]!r}, which is no sync point of its calibration "
                f"({', '.join(sorted(self.calibration.sync_points)[:2])}, …)"
            )
        assert self.scheme.name == self.name  # builds it, or says why that cannot be

    @cached_property
    def scheme(self) -> CommScheme:
        """The scheme itself."""
        base = parse_scheme(self.base)
        points, choices = list(base.points), {base.outlier_choice} - {"none"}
        for name, (reduce_name, gather_name) in sorted(self.formats.items()):
            (reduce_stage, first), (gather_stage, second) = parse_format(reduce_name), parse_format(gather_name)
            points.append(PointFormats(name, reduce_stage, gather_stage))
            choices |= {first, second} - {"none"}
        if choices - {"calibrated"}:
            raise ValueError("its outliers are random ones; formats of single sync points take calibrated ones")
        return replace(base, name=self.name, points=tuple(points), outlier_choice="calibrated" if choices else "none")

    def save(self, path: Path) -> None:
        """Writes beside `path`, then renames. Raises ValueError for a path that would not be taken for a scheme's."""
        check_path(path)
        stored = {"base": self.base, "formats": {name: list(pair) for name, pair in self.formats.items()}}
        self.calibration.save(path, {KEY: json.dumps({**stored, "origin": asdict(self.origin)})})

    @classmethod
    def load(cls, path: Path) -> TunedScheme:
        """Named as its file. Raises FileNotFoundError or ValueError that says what is wrong with it, and what to do."""
        if not path.is_file():
            raise FileNotFoundError(f"scheme file {path} not found; make it with `megatron-lowbit tune-scheme`")
        calibration = CommCalibration.load(path)
        with safe_open(path, framework="pt") as file:
            text = file.metadata().get(KEY)
        if text is None:
            raise ValueError(
                f"{path} is a calibration without a scheme; pass it with --calibration and name a scheme, or "
                "make a scheme file with `megatron-lowbit tune-scheme`"
            )
        try:
            stored = json.loads(text)
            formats = {name: _pair(pair) for name, pair in _mapping(stored, "formats").items()}
            return cls(path.name, stored["base"], formats, _origin(_mapping(stored, "origin")), calibration)
        except KeyError as error:
            raise ValueError(f"scheme file {path} is damaged (it lacks {error}); {AGAIN}") from error
        except ValueError as error:  # of JSON too
            raise ValueError(f"scheme file {path} is damaged ({error}); {AGAIN}") from error


def is_scheme_file(text: str | Path) -> bool:
    """True for what is meant as a file; all else is the name of a scheme."""
    return isinstance(text, Path) or text.endswith(SUFFIX)


def check_path(path: Path) -> None:
    """Raises ValueError for the path of a scheme file to write that would be taken for a name."""
    if path.suffix != SUFFIX:
        raise ValueError(f"{path} is no name for a scheme file; let it end in {SUFFIX}")


def _mapping(stored: Any, key: str) -> dict[str, Any]:
    if not isinstance(stored, dict) or not isinstance(stored.get(key, {}), dict):
        raise ValueError(f"no table {key!r}")
    return dict(stored[key])


def _pair(value: Any) -> tuple[str, str]:
    if not (isinstance(value, list) and len(value) == 2 and all(isinstance(name, str) for name in value)):
        raise ValueError(f"formats {value!r} of a sync point are not a pair of names")
    return value[0], value[1]


def _origin(stored: Mapping[str, Any]) -> SchemeOrigin:
    odd = sorted(set(stored) ^ {field.name for field in fields(SchemeOrigin)})
    if odd:
        raise ValueError(f"{odd[0]!r} of its origin is missing or unknown")
    return SchemeOrigin(**stored)
