"""Names of wire formats: `int4-g64-asym` is read as a user would say it. `parse_format` holds the rules."""

from __future__ import annotations

import re
from typing import Any, Literal

from lowbit_kernels.layout import CODE_BITS
from megatron_lowbit.comm.wire_format import WHOLE_ROW, WireFormat

OutlierChoice = Literal["none", "calibrated", "random"]
#: Of how many features one travels as BF16 where a name ends in -outlier or -random (the paper's share).
OUTLIER_DIVISOR = 64

GRAMMAR = (
    "exact, bf16, int2 to int8, fp8 (e4m3), fp4 (e2m1), lm2 to lm4 and nf4 (code books), tc2 to tc4 (trellis-coded), "
    "mxfp4, mxfp8, nvfp4; behind codes -group, -gN (a scale for every N values) or -token (one for every row), else "
    "calibrated static scales (not of code books), -e8m0 (not of code books) or -e4m3 (one-byte group scales), -asym "
    "(integers from a minimum on), -fitted (static scales of least squared error), -prescaled or -prescaledA "
    "(groups; by the rms to the power A, 0.5), -hadamardN or -rotated (groups; every N features mixed, or all), and "
    "-outlier, -outlierN or -random, -randomN (1/64 or 1/N of the features as BF16), as in int4-g32-asym; "
    "REDUCE+GATHER for two different stages; then ':one-stage' and, with -random, ':seed=N'; ':loop' and ':predict', "
    "':predict=RANK' or ':centred' for what goes beyond partial sums; ':first=FORMAT' and ':last=FORMAT' for the "
    "first and the last sync point of the model"
)
#: Fields of a WireFormat. A base alone need not make one: levels of a code book want groups.
_BASES: dict[str, dict[str, Any]] = {
    "exact": {"bits": 32},
    "bf16": {"bits": 16},
    **{f"int{bits}": {"bits": bits} for bits in CODE_BITS["int"]},
    "fp8": {"bits": 8, "values": "e4m3"},
    "fp4": {"bits": 4, "values": "e2m1"},
    **{f"lm{bits}": {"bits": bits, "values": "lm"} for bits in CODE_BITS["lm"]},
    "nf4": {"bits": 4, "values": "nf4"},
    **{f"tc{bits}": {"bits": bits, "values": "tc"} for bits in CODE_BITS["tc"]},
    # OCP Microscaling Formats 1.0, and NVIDIA's (its scale of a tensor is one of a row here)
    "mxfp4": {"bits": 4, "group_size": 32, "values": "e2m1", "scale_format": "e8m0"},
    "mxfp8": {"bits": 8, "group_size": 32, "values": "e4m3", "scale_format": "e8m0"},
    "nvfp4": {"bits": 4, "group_size": 16, "values": "e2m1", "scale_format": "e4m3"},
}


def parse_format(name: str) -> tuple[WireFormat, OutlierChoice]:
    """The format of one stage, and how its BF16 features are chosen.

    A base (`int4`, `fp8`, `lm3`, `nvfp4`), then options in any order, each of them once, behind hyphens: `gN`, `group`
    (64 values a scale, 128 of 8 bits) or `token` (a row a scale), `e8m0`, `e4m3`, `asym`, `fitted`, `prescaled` or
    `prescaled0.7`, `rotated` or `hadamardN`, `outlier`, `outlierN`, `random`, `randomN`.
    Raises ValueError for any other name, and for combinations that have no meaning; `GRAMMAR` says what there is.
    """
    base, *options = name.split("-")
    if base not in _BASES:
        raise ValueError(f"no format is called {base!r}")
    given = _BASES[base]
    choice: OutlierChoice = "none"
    chosen: dict[str, Any] = {}
    for option in options:
        fields = _option(option, given["bits"])
        for field in fields:
            if field in chosen or field in given:
                raise ValueError(f"option {option!r} of {name!r} settles {field} a second time")
        chosen |= fields
        if "outlier_divisor" in fields:
            choice = "random" if option.startswith("random") else "calibrated"
    return WireFormat(**{**given, **chosen}), choice


def _option(option: str, bits: int) -> dict[str, Any]:
    """The fields of a WireFormat that an option sets."""
    if numbered := re.fullmatch("(g|hadamard|outlier|random)([1-9][0-9]{0,8})", option):
        field = {"g": "group_size", "hadamard": "rotation"}.get(numbered[1], "outlier_divisor")
        return {field: int(numbered[2])}
    if power := re.fullmatch(r"prescaled(0\.[0-9]{1,3}|1)", option):
        return {"prescaled": True, "exponent": float(power[1])}
    named: dict[str, dict[str, Any]] = {
        "group": {"group_size": 128 if bits == 8 else 64},
        "token": {"group_size": WHOLE_ROW},
        "e8m0": {"scale_format": "e8m0"},
        "e4m3": {"scale_format": "e4m3"},
        "asym": {"asymmetric": True},
        "fitted": {"fitted": True},
        "prescaled": {"prescaled": True},
        "rotated": {"rotation": "full"},
        "outlier": {"outlier_divisor": OUTLIER_DIVISOR},
        "random": {"outlier_divisor": OUTLIER_DIVISOR},
    }
    if option not in named:
        raise ValueError(f"no option of a format is called {option!r}")
    return named[option]
