"""Code books: the numbers that codes of "lm", "tc" and "nf4" stand for, before any scale. The only table of them.

A code is the index of a level, in ascending order (not of "tc"). Levels lie from -1 to 1 and are held in bf16, so that
level times scale is exact in fp32; so are the thresholds half way between them.

"lm" (Lloyd-Max: levels near the means of the values they stand for): a group is scaled so that its value of largest
magnitude, of either sign, is -1. That one is sent exactly but for the scale's rounding, and the other levels serve what
the rest of a group looks like: denser around 0, and a little farther down than up. They were found by Lloyd's algorithm
(least squared error) on what travels between the ranks of SmolLM2 135M and Gemma 3 270M in groups of 40, prescaled,
foretold and in the loop, half of it partial sums and half sums. Beside integers of as many bits they lose 0.4 to 0.6 dB
less (2 bits), 0.6 to 0.8 (3) and 0.7 to 1.0 (4); levels found for one model and stage alone would gain 0.02 dB more.
"tc" (trellis-coded): twice as many levels as codes; which half a code picks from depends on those before it, see
`reference_trellis.py`. Found in the same way on the same values, in groups of 64. A group is scaled as for "lm", beside
which they lose 1.8 dB less (2 bits), 1.65 (3) and 1.5 (4).
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
    ("lm", 2): (-1.0, -0.3457, 0.0527, 0.4922),
    ("lm", 3): (-1.0, -0.6172, -0.3613, -0.1563, 0.0277, 0.2197, 0.4434, 0.7383),
    ("lm", 4): (
        *(-1.0, -0.7891, -0.6289, -0.4961, -0.3789, -0.2734, -0.1748, -0.0815),
        *(0.0083, 0.0996, 0.1963, 0.2988, 0.4121, 0.5391, 0.6875, 0.8711),
    ),
    ("tc", 2): (-1.0, -0.5234, -0.2852, -0.1196, 0.0378, 0.1904, 0.375, 0.6562),
    ("tc", 3): (
        *(-1.0, -0.7188, -0.5391, -0.4121, -0.3066, -0.2168, -0.1328, -0.0542),
        *(0.0253, 0.1011, 0.1836, 0.2695, 0.3672, 0.4785, 0.625, 0.8281),
    ),
    ("tc", 4): (
        *(-1.0, -0.8438, -0.7227, -0.6289, -0.5547, -0.4902, -0.4355, -0.3848),
        *(-0.332, -0.2891, -0.2432, -0.2012, -0.1562, -0.1157, -0.0732, -0.0334),
        *(0.0085, 0.0479, 0.0903, 0.1299, 0.1729, 0.2139, 0.2578, 0.3027),
        *(0.3496, 0.4004, 0.4551, 0.5156, 0.582, 0.668, 0.7773, 0.9141),
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
    """The 2^bits numbers ("tc": twice as many), ascending, that codes stand for; empty for values without any."""
    return tuple(_bf16(level) for level in _LEVELS.get((values, bits), ()))


@functools.cache
def thresholds(values: str, bits: int) -> tuple[float, ...]:
    """Half way between neighbours: a number has as code how many of these it exceeds, so a tie takes the lower."""
    return tuple((low + high) / 2 for low, high in pairwise(levels(values, bits)))


def _bf16(x: float) -> float:
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    return float(struct.unpack("<f", struct.pack("<I", (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000))[0])
