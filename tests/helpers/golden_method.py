"""The whole method in NumPy: calibrated constants, and what every rank holds after an all-reduce. See `golden.py`.

Legend: T tokens, H hidden features, K outliers, R ranks.
"""

from __future__ import annotations

import numpy as np
from helpers import golden_rotation
from helpers.golden import SMALLEST_SCALE, Format, decode, decode_sum, encode
from helpers.golden_numbers import F32, round_bf16

INT4 = Format(4)


def all_reduce(
    partials: list[np.ndarray],
    reduce_stage: Format,
    gather_stage: Format | None,
    reduce_scales: np.ndarray | None = None,
    gather_scale: np.ndarray | None = None,
    outlier_index: np.ndarray | None = None,
    reduce_minimums: np.ndarray | None = None,
    gather_minimum: np.ndarray | None = None,
    rotations: tuple[int | str, int | str] = (0, 0),
) -> np.ndarray:
    """What every rank holds: packets to the owner, summed there, the sum in a packet to all (two-stage).

    rotations: of the stages, see `golden_rotation`; a rotated stage has one row of scales for all ranks.
    """
    hidden = partials[0].shape[1]
    packets = []
    if rotations[0]:
        factors = None if reduce_scales is None else reduce_scales[0]
        rotated = reduce_stage, rotations[0], factors, outlier_index
        total = golden_rotation.decode_sum([golden_rotation.encode(x, *rotated) for x in partials], hidden, *rotated)
    else:
        for rank, x in enumerate(partials):
            scale, minimum = (None if table is None else table[rank] for table in (reduce_scales, reduce_minimums))
            packets.append(encode(x, reduce_stage, scale, outlier_index, minimum))
        total = decode_sum(packets, hidden, reduce_stage, reduce_scales, outlier_index, reduce_minimums)
    if gather_stage is None:
        return total
    if rotations[1]:
        rotated = gather_stage, rotations[1], gather_scale, outlier_index
        return golden_rotation.decode_sum([golden_rotation.encode(total, *rotated)], hidden, *rotated)
    packet = encode(total, gather_stage, gather_scale, outlier_index, gather_minimum)
    return decode(packet, hidden, gather_stage, gather_scale, outlier_index, gather_minimum)


def static_scale(minimum: np.ndarray, maximum: np.ndarray, wire: Format = INT4) -> np.ndarray:
    """Scale of each feature for codes around 0: the larger bound over the largest code, rounded to bf16, >= 2^-100."""
    largest = np.maximum(np.abs(minimum), np.abs(maximum)).astype(F32)
    codes = {"int": 2 ** (wire.bits - 1) - 1, "e4m3": 448, "e2m1": 6}[wire.values]
    return np.maximum(round_bf16(largest / F32(codes)), SMALLEST_SCALE)


def chosen_outliers(minimum: np.ndarray, maximum: np.ndarray, count: int) -> list[int]:
    """The `count` features with the largest range `sum over ranks of 2 max(|m|, |M|)`, lower ones first on a tie."""
    ranges = [
        sum(2.0 * max(abs(float(low)), abs(float(high))) for low, high in zip(lows, highs, strict=True))
        for lows, highs in zip(minimum.T, maximum.T, strict=True)
    ]
    return sorted(sorted(range(len(ranges)), key=lambda feature: (-ranges[feature], feature))[:count])
