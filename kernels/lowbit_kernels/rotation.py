"""Rotation: an orthogonal map of a row of features, by additions and subtractions; `rotate` is its definition in torch.

A Walsh-Hadamard transform spreads each feature evenly over all that it is mixed with, so that no value of a group
stands out. One of `size` values (a power of two) is, for h = 1, 2, 4, ... size / 2, of every two values a and b that
lie h apart in runs of 2 h: a + b and a - b, each rounded to fp32; then all times `scale_of(size)`. It is its own
inverse. Each value is one fp32 operation of two that are settled here, so the order of evaluation cannot change a bit.
Every NaN that comes out has the bits 0x7FC00000.

Legend: T tokens, H hidden features, K outliers.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from lowbit_kernels.backends import Backend
from lowbit_kernels.reference_floats import one_nan

#: Features that are mixed with each other: so many in a row, or all.
Block = int | Literal["full"]

SQRT_HALF = 0.70710676908493041992  # fp32 has exactly this number
_HASH = 0x9E3779B1  # the prime next to 2^32 over the golden ratio
_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Run:
    """`count` transforms of `size` features each, side by side from feature `start` on.

    number: where it is given, features change their signs by `sign_bits` before.
    """

    start: int
    size: int
    count: int = 1
    number: int | None = None


@dataclass(frozen=True)
class Rotation:
    """Which features of a row are mixed.

    block: every so many (a power of two) are mixed with each other, and what is left at the end in descending powers
        of two. "full": the first n features, then the last n, n the largest power of two within the row, each time
        with signs of their own. Without other signs in between, the second transform would gather again much of what
        the first one has spread, where the two overlap: shifted, a Walsh function resembles itself.

    Raises ValueError for another block.
    """

    features: int
    block: Block

    def __post_init__(self) -> None:
        check_block(self.block)
        assert self.features >= 1, self.features

    @functools.cached_property
    def runs(self) -> tuple[Run, ...]:
        """One after the other; those of blocks do not touch each other."""
        largest = 1 << (self.features.bit_length() - 1)
        if self.block == "full":
            first = Run(0, largest, number=0)
            return (first, Run(self.features - largest, largest, number=1)) if largest < self.features else (first,)
        runs, start, size = [], 0, min(self.block, largest)
        while start < self.features:
            count = (self.features - start) // size
            if count:
                runs.append(Run(start, size, count))
            start, size = start + count * size, size // 2
        return tuple(runs)


def check_block(block: Block) -> None:
    """Raise ValueError for anything but "full" and powers of two from 2 on."""
    if block != "full" and (block < 2 or block & (block - 1)):
        raise ValueError(f"rotation is in blocks of {block}; allowed: powers of two from 2 on, or 'full'")


def scale_of(size: int) -> float:
    """fp32 number next to 1 / sqrt(size)."""
    log = size.bit_length() - 1
    return (SQRT_HALF if log % 2 else 1.0) * 0.5 ** (log // 2)


@functools.lru_cache(maxsize=256)
def sign_bits(run: Run, device: torch.device) -> Tensor:
    """int32 `[size]`: the sign bit where a feature of a signed run changes its sign, else 0. A hash of its number."""
    assert run.number is not None and run.count == 1
    mixed = (torch.arange(run.start, run.start + run.size, dtype=torch.int64) * 2 + run.number + 1) * _HASH & _LOW_32
    mixed = (mixed ^ (mixed >> 15)) * _HASH & _LOW_32
    mixed = (mixed ^ (mixed >> 13)) * _HASH & _LOW_32
    return (-(mixed >> 31) << 31).to(torch.int32).to(device)


class Rotate(Protocol):
    """What `get_rotate` returns; `rotate` is its definition."""

    def __call__(self, rows_TH: Tensor, rotation: Rotation, inverse: bool = False) -> None: ...


def rotate(rows_TH: Tensor, rotation: Rotation, inverse: bool = False) -> None:
    """Rotate fp32 rows in place, or back. What is beyond fp32 on the way is Inf or NaN in all that it is mixed with.

    Raises ValueError for rows that do not fit.
    """
    check_rows(rows_TH, rotation)
    tokens = rows_TH.shape[0]
    for run in reversed(rotation.runs) if inverse else rotation.runs:
        window = rows_TH[:, run.start : run.start + run.count * run.size]
        signs = None if run.number is None else sign_bits(run, rows_TH.device)
        values = window if signs is None or inverse else _signed(window, signs)
        half = 1
        while half < run.size:
            pairs = values.reshape(tokens, run.count * run.size // (2 * half), 2, half)
            a, b = pairs[:, :, 0], pairs[:, :, 1]
            values = torch.stack((a + b, a - b), dim=2).view(window.shape)
            half *= 2
        values = values * scale_of(run.size)
        window.copy_(one_nan(values if signs is None or not inverse else _signed(values, signs)))


def check_rows(rows_TH: Tensor, rotation: Rotation) -> None:
    """Raise ValueError for anything that does not fit."""
    if rows_TH.dtype is not torch.float32 or rows_TH.dim() != 2 or rows_TH.shape[1] != rotation.features:
        found = f"{rows_TH.dtype} {tuple(rows_TH.shape)}"
        raise ValueError(f"rows_TH is {found}; rotate takes torch.float32 [T, {rotation.features}]")
    if rotation.features > 1 and rows_TH.numel() and rows_TH.stride(1) != 1:
        raise ValueError(f"rows_TH has strides {rows_TH.stride()}; the elements of a row must be adjacent")


def get_rotate(codec: Backend) -> Rotate:
    """What goes with a codec from `get_backend`."""
    modules = {"cpu": "cpu_rotation", "triton": "triton_rotation"}
    if codec.name not in modules:
        return rotate
    return cast(Rotate, importlib.import_module(f"lowbit_kernels.{modules[codec.name]}").rotate)


def _signed(values: Tensor, signs: Tensor) -> Tensor:
    return (values.contiguous().view(torch.int32) ^ signs).view(torch.float32)
