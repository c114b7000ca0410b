"""Numbers as bits in NumPy, for `golden.py`: bf16, the small floats, planes of codes. Imports nothing of the project.

Legend: T tokens, N values of a row.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

F32 = np.float32
BF16_NAN = 0x7FC0
F32_NAN = 0x7FC00000
PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}

# Every value of the small floats that is not negative, in the order of their codes. e4m3: 0 to 7 times 2^-9, then 8 to
# 15 times 2^-9, 2^-8, and so on to 14 times 2^5 = 448; 15 times that would be NaN.
E4M3 = np.array([(8 * (e > 0) + m) * 2.0 ** (max(e, 1) - 10) for e in range(16) for m in range(8)][:127])
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """uint16, nearest, ties to the even neighbour; every NaN becomes 0x7FC0."""
    bits = np.ascontiguousarray(values, dtype=F32).view(np.uint32)
    kept, dropped = bits >> 16, bits & 0xFFFF
    up = (dropped > 0x8000) | ((dropped == 0x8000) & (kept % 2 == 1))
    return np.where(np.isnan(values), BF16_NAN, kept + up).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(F32)


def round_bf16(values: np.ndarray) -> np.ndarray:
    return bf16_values(bf16_bits(values))


def small_float_codes(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Codes of the nearest values of `table` and the sign above them; a tie takes the even code, the last saturates."""
    between = (table[1:] + table[:-1]) / 2  # exact, and an fp32 number compares with it exactly
    magnitude = np.abs(values.astype(np.float64))
    below = np.searchsorted(between, magnitude, side="left")
    tie = np.isin(magnitude, between)
    nearest = np.where(tie & (below % 2 == 1), below + 1, below)
    return nearest + np.signbit(values) * (128 if table is E4M3 else 8)


def small_float_values(codes: np.ndarray, table: np.ndarray) -> np.ndarray:
    half = 128 if table is E4M3 else 8
    with_nan = np.append(table, np.nan).astype(F32)[np.minimum(codes % half, len(table))]
    return np.where(codes >= half, -with_nan, with_nan)


def canonical(values: np.ndarray) -> np.ndarray:
    """The same values with one bit pattern for NaN, so that results can be compared as integers."""
    return np.where(np.isnan(values), np.uint32(F32_NAN), np.ascontiguousarray(values, F32).view(np.uint32)).view(F32)


def pack_planes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[T, N]`, of which the low `bits` count, to bytes."""
    strings = (codes[:, :, None].astype(np.int64) >> np.arange(bits)) & 1
    cuts = np.cumsum([0, *PLANES[bits]])
    planes = [strings[:, :, start:stop].astype(bool) for start, stop in pairwise(cuts)]
    planes = [plane.reshape(len(plane), plane.shape[1] * plane.shape[2]) for plane in planes]
    return np.concatenate([np.packbits(plane, axis=1, bitorder="little") for plane in planes], axis=1)


def unpack_planes(section: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes `[T, N]` from 0 up."""
    codes = np.zeros((len(section), count), np.int64)
    place = 0
    for width in PLANES[bits]:
        nbytes = -(-count * width // 8)
        string = np.unpackbits(section[:, :nbytes], axis=1, count=count * width, bitorder="little")
        parts = string.reshape(len(codes), count, width).astype(np.int64)
        codes += (parts << np.arange(place, place + width)).sum(axis=2)
        section, place = section[:, nbytes:], place + width
    return codes


def as_bytes(section: np.ndarray) -> np.ndarray:
    rows, columns = section.shape
    return np.ascontiguousarray(section).view(np.uint8).reshape(rows, columns * section.itemsize)


def uint16(section: np.ndarray) -> np.ndarray:
    return section[:, 0::2].astype(np.uint16) + section[:, 1::2].astype(np.uint16) * np.uint16(256)
