"""CommScheme: what one all-reduce puts on the wire, by name. SCHEMES is the table of all names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron_lowbit.comm.wire_format import WireFormat

OutlierChoice = Literal["none", "calibrated", "random"]
ONE_STAGE = "one-stage"


@dataclass(frozen=True)
class CommScheme:
    """A named pair of wire formats.

    reduce_stage: format of the partial sums on their way to the token's owner (two-stage) or to everybody (one-stage).
    gather_stage: format of the sum on its way back; None makes the scheme one-stage.
    outlier_choice: how the BF16 features are found: from calibrated ranges, or at random (seeded) as a baseline.
    """

    name: str
    reduce_stage: WireFormat
    gather_stage: WireFormat | None
    outlier_choice: OutlierChoice = "none"
    seed: int = 0

    @property
    def stages(self) -> int:
        return 1 if self.gather_stage is None else 2

    @property
    def needs_calibration(self) -> bool:
        return self.reduce_stage.is_static or (self.gather_stage is not None and self.gather_stage.is_static)

    def for_dtype(self, dtype: torch.dtype) -> CommScheme:
        """`exact` sends partial sums in the model's own dtype, which loses nothing; other schemes stay as they are."""
        if self.name.split(":")[0] == "exact" and dtype == torch.bfloat16:
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


def _two_stage(name: str, wire: WireFormat, choice: OutlierChoice = "none") -> CommScheme:
    return CommScheme(name, wire, wire, choice)


SCHEMES: dict[str, CommScheme] = {
    scheme.name: scheme
    for scheme in (
        # unrounded FP32 sum in rank order: the reference of every quality number
        _two_stage("exact", WireFormat(32)),
        _two_stage("bf16", WireFormat(16)),
        _two_stage("int8-group", WireFormat(8, group_size=128)),
        _two_stage("int4-group", WireFormat(4, group_size=64)),
        _two_stage("int4", WireFormat(4)),
        _two_stage("int4-random", WireFormat(4, outlier_divisor=64), "random"),
        _two_stage("int4-outlier", WireFormat(4, outlier_divisor=64), "calibrated"),
    )
}


def parse_scheme(text: str) -> CommScheme:
    """Scheme of a name with options behind colons: `int4-outlier`, `int4:one-stage`, `int4-random:seed=2`.

    Raises ValueError for an unknown name or option.
    """
    base, *options = text.split(":")
    if base not in SCHEMES:
        raise ValueError(
            f"unknown scheme {text!r}; known: {', '.join(SCHEMES)}, each also with ':{ONE_STAGE}', "
            "and int4-random with ':seed=N'"
        )
    scheme = SCHEMES[base]
    for option in options:
        if option == ONE_STAGE:
            scheme = replace(scheme, gather_stage=None)
        elif option.startswith("seed=") and option[5:].isdecimal() and scheme.outlier_choice == "random":
            scheme = replace(scheme, seed=int(option[5:]))
        else:
            raise ValueError(
                f"scheme {text!r}: unknown option {option!r}; allowed: '{ONE_STAGE}' and, for int4-random, 'seed=N'"
            )
    return replace(scheme, name=text)
