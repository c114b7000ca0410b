"""Random all-reduces: a scheme, its constants and the partial sums of every rank, all from one seed.

Every rank of a distributed test draws the whole message by itself, so nothing has to be sent to compare results.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass, replace

import torch

from megatron_lowbit.comm.constants import SyncPointConstants
from megatron_lowbit.comm.schemes import ONE_STAGE, SCHEMES, CommScheme, parse_scheme
from megatron_lowbit.comm.wire_format import WireFormat

ALL_SCHEMES = [name + ending for name in SCHEMES for ending in ("", f":{ONE_STAGE}")]
#: Names that are not in the table: one of every kind of format, and mixes of two.
MORE_SCHEMES = [
    *("int3-group", "int6-g32", "int2-g16-asym", "int4-g100-asym", "int7-g64-e8m0", "int4-g64-e4m3"),
    *("int5", "int5-asym", "fp8", "fp4", "fp8-g128", "fp4-g32", "mxfp4", "mxfp8", "nvfp4"),
    *("int4-g64-prescaled", "int4-g64-outlier", "int3-g32-random", "nvfp4-outlier", "int6-asym-outlier"),
    *("lm2-g16", "lm3-g40-e4m3-prescaled", "lm4-group", "lm4-g100-random", "nf4-g64-e4m3-outlier", "nf4-token"),
    *("tc2-g16", "tc3-g40-e4m3-prescaled", "tc4-group+lm3-g32", "tc4-g100-random", "tc3-g64-e4m3-outlier"),
    *("int4-token", "int6-token-asym", "fp8-token-e8m0", "lm3-token-outlier", "lm4-g40+int8-token"),
    *("int5:one-stage", "int5-asym:one-stage", "mxfp4:one-stage", "int4-g64-prescaled:one-stage"),
    *("int4-g64+int8-g128", "bf16+int4-asym", "int4-outlier+int8-g128", "nvfp4+int6-random"),
]
#: Features mixed in blocks or all, with each of what goes along.
ROTATED_SCHEMES = [
    *("int4-g64-rotated", "int3-g64-hadamard64", "int4-g40-e4m3-prescaled-rotated", "mxfp4-hadamard32"),
    *("int4-g64-rotated-outlier", "int5-g32-asym-hadamard2-random", "nvfp4-prescaled-outlier-rotated"),
    *("int2-g16-hadamard1024-prescaled-outlier", "int4-g64-prescaled-rotated-random+int8-g128"),
    *("int6-asym-outlier+int4-g32-prescaled-hadamard16-outlier", "exact+int8-group-rotated", "bf16+fp8-g32-rotated"),
    *("tc3-g64-e4m3-prescaled-rotated", "tc4-g40-hadamard8-outlier+int6-g64-outlier"),
    *("int4-g64-rotated:one-stage", "int4-g64-prescaled-rotated-outlier:one-stage"),
]
#: Values at which formats and sums do something particular: not finite, beyond bf16, denormal, ties of rounding.
SPECIAL = (math.nan, math.inf, -math.inf, 3e38, -3e38, 3.4028235e38, 1e-45, -1e-40, 2.0**-101, 0.5, -1.5, 1.00390625)


@dataclass(frozen=True)
class Message:
    seed: int
    scheme: CommScheme
    constants: SyncPointConstants
    partials: list[torch.Tensor]

    def __str__(self) -> str:
        first = self.partials[0]
        return (
            f"message {self.seed}: {self.scheme.name}, R={len(self.partials)}, "
            f"T={first.shape[0]}, H={first.shape[1]}, {first.dtype}"
        )


def random_constants(
    scheme: CommScheme, ranks: int, hidden: int, generator: torch.Generator, spread: float
) -> SyncPointConstants:
    """Any outlier set of the right size and any bf16 scales, unrelated to the values: nearly all codes occur."""
    count = scheme.outlier_count(hidden)
    order = torch.randperm(hidden, generator=generator)
    outliers, body = order[:count].sort().values, order[count:].sort().values

    def scales(rows: int, wire: WireFormat | None) -> torch.Tensor | None:
        if wire is None or not wire.is_static:
            return None
        rows, features = (1, hidden) if wire.rotation else (rows, hidden - wire.outlier_count(hidden))
        drawn = (torch.randn(rows, features, generator=generator) * spread).exp()
        return drawn.bfloat16().float().clamp_min(2.0**-100)

    def minimums(wire: WireFormat | None, scale: torch.Tensor | None) -> torch.Tensor | None:
        if wire is None or not wire.has_static_minimum or scale is None:
            return None
        steps = torch.randn(scale.shape, generator=generator) * 2**wire.bits
        return (steps * scale).bfloat16().float().clamp(-(2.0**127), 2.0**127)

    reduce_scale, gather_scale = scales(ranks, scheme.reduce_stage), scales(1, scheme.gather_stage)
    return SyncPointConstants(
        body_index=body if count else None,
        outlier_index=outliers if count else None,
        reduce_scale_RD=reduce_scale,
        gather_scale_1D=gather_scale,
        reduce_minimum_RD=minimums(scheme.reduce_stage, reduce_scale),
        gather_minimum_1D=minimums(scheme.gather_stage, gather_scale),
    )


def random_values(
    shape: tuple[int, ...], generator: torch.Generator, magnitude: float, special_share: float
) -> torch.Tensor:
    x = torch.randn(shape, generator=generator) * magnitude
    if special_share:
        chosen = torch.rand(shape, generator=generator) < special_share
        special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
        x = torch.where(chosen, special, x)
    return x


def draw_message(
    seed: int,
    ranks: int,
    scheme_name: str | None = None,
    tokens: int | None = None,
    hidden: int | None = None,
    most_values: int | None = 60_000,
) -> Message:
    """The message of a seed: T of 0 to 300 and H of 1 to 2000, mostly small, now and then with values not finite."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    scheme = parse_scheme(scheme_name or ALL_SCHEMES[seed % len(ALL_SCHEMES)])
    if rng.random() < 0.1:  # `exact` for a bf16 model, and stages of two different formats
        scheme = scheme.for_dtype(torch.bfloat16)
    if scheme.gather_stage is not None and rng.random() < 0.1:
        scheme = replace(scheme, gather_stage=WireFormat(16))
    tokens = tokens if tokens is not None else rng.choice([0, 1, 2, ranks - 1, ranks, int(301 ** rng.random())])
    if hidden is None:
        hidden = rng.choice([1, 2, 63, 64, 65, 127, 128, 129, 576, int(2001 ** rng.random())])
    if most_values is not None and tokens * hidden > most_values:  # keeps the usual set fast
        hidden = max(1, most_values // tokens)
    constants = random_constants(scheme, ranks, hidden, generator, rng.choice([0.5, 3.0, 20.0]))
    special = rng.choice([0.0, 0.0, 0.0, 0.01, 0.2])
    magnitude = rng.choice([1.0, 1.0, 1e-3, 1e4, 1e37, 1e-41])
    dtype = rng.choice([torch.float32, torch.bfloat16])
    partials = [random_values((tokens, hidden), generator, magnitude, special).to(dtype) for _ in range(ranks)]
    return Message(seed, scheme, constants, partials)


def draw_wide_message(seed: int, ranks: int) -> Message:
    """Like `draw_message`, with T of 0 to 300 and H of 1 to 5,000 drawn evenly: large messages are the rule."""
    rng = random.Random(f"wide {seed}")
    return draw_message(seed, ranks, tokens=rng.randint(0, 300), hidden=rng.randint(1, 5000), most_values=None)


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal shape, type and bits: -0.0 differs from 0.0, a NaN equals only a NaN of the same bits."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    return digest(got) == digest(expected)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
