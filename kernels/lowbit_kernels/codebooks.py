"""Code books: the numbers that codes of "lm" and "nf4" stand for, before any scale. The only table of them.

A code is the index of a level, in ascending order. Levels lie from -1 to 1 and are held in bf16, so that level times
scale is exact in fp32; so are the thresholds half way between them.

"lm" (Lloyd-Max: levels near the means of the values they stand for): a group is scaled so that its value of largest
magnitude, of either sign, is -1. That one is sent exactly but for the scale's rounding, and the other levels serve what
the rest of a group looks like: denser around 0, and a little farther down than up.
"nf4": the levels of QLoRA's 4-bit NormalFloat (arXiv 2305.14314, appendix E), for groups whose largest magnitude is 1.

Any ascending numbers that begin with -1 will do. Those that are also multiples of 2^-14 whose thresholds are more than
2^-4 apart have a fast way on CPUs (csrc/avx512_levels.h).
"""

from __future__ import annotations

import functools
import struct
from itertools import pairwise

#: By values and bits; `levels` rounds them to bf16.
_LEVELS: dict[tuple[str, int], tuple[float, ...]] = {
    ("lm", 2): (-1.0, -0.35, 0.1, 0.62),
    ("lm", 3): (-1.0, -0.6, -0.36, -0.17, 0.0, 0.18, 0.38, 0.66),
    ("lm", 4): (
        *(-1.0, -0.80, -0.64, -0.51, -0.40, -0.30, -0.205, -0.115),
        *(-0.03, 0.055, 0.145, 0.24, 0.345, 0.46, 0.60, 0.79),
    ),
    ("nf4", 4): (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
}


@functools.cache
def levels(values: str, bits: int) -> tuple[float, ...]:
    """The 2^bits numbers, ascending, that codes stand for; empty for values that have no code book."""
    return tuple(_bf16(level) for level in _LEVELS.get((values, bits), ()))


@functools.cache
def thresholds(values: str, bits: int) -> tuple[float, ...]:
    """Half way between neighbours: a number has as code how many of these it exceeds, so a tie takes the lower."""
    return tuple((low + high) / 2 for low, high in pairwise(levels(values, bits)))


def _bf16(x: float) -> float:
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    return float(struct.unpack("<f", struct.pack("<I", (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000))[0])
