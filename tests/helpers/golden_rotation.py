"""Rotated features in NumPy, from their description alone: nothing of the project is imported here. See `golden.py`.

A transform of n = 2^k values is that of each half, then their sum and their difference, times 1 / sqrt(n) at the end.
Blocks of N are transformed one by one, what is left at the end in descending powers of two. "full" transforms the first
n features and then the last n, n the largest power of two within the row; before each, features change their signs.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a row.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from helpers import golden
from helpers.golden_numbers import F32, canonical


def windows(features: int, block: int | str) -> list[tuple[int, int]]:
    """First feature and size of every transform, in order."""
    if block == "full":
        size = 2 ** int(np.log2(features))
        return [(0, size)] + ([(features - size, size)] if size < features else [])
    found, start = [], 0
    while start < features:
        size = block
        while size > features - start:
            size //= 2
        found.append((start, size))
        start += size
    return found


def signs(start: int, size: int, number: int) -> np.ndarray:
    """1 or -1 for each feature of the transform `number` of a full rotation."""
    prime, found = 0x9E3779B1, []
    for feature in range(start, start + size):
        mixed = (2 * feature + number + 1) * prime % 2**32
        mixed = (mixed ^ mixed >> 15) * prime % 2**32
        mixed = (mixed ^ mixed >> 13) * prime % 2**32
        found.append(-1 if mixed >= 2**31 else 1)
    return np.array(found, F32)


def butterflies(x: np.ndarray, block: int | str, inverse: bool = False) -> np.ndarray:
    """FP32 rows rotated, or back."""
    x = x.astype(F32)
    numbered = list(enumerate(windows(x.shape[1], block)))
    with np.errstate(all="ignore"):
        for number, (start, size) in reversed(numbered) if inverse else numbered:
            flips = signs(start, size, number) if block == "full" else np.ones(size, F32)
            part = x[:, start : start + size]
            part = _transform(part if inverse else part * flips) * F32(2.0 ** (-np.log2(size) / 2))
            x[:, start : start + size] = part * flips if inverse else part
    return canonical(x)


def _transform(x: np.ndarray) -> np.ndarray:
    size = x.shape[1]
    if size == 1:
        return x
    low, high = _transform(x[:, : size // 2]), _transform(x[:, size // 2 :])
    return np.concatenate([low + high, low - high], axis=1)


def dense_matrix(features: int, block: int | str) -> np.ndarray:
    """FP64 matrix `[H, H]` that a column of features is multiplied by."""
    matrix = np.eye(features)
    for number, (start, size) in enumerate(windows(features, block)):
        part = np.ones((1, 1))
        while len(part) < size:
            part = np.block([[part, part], [part, -part]])
        part = part / np.sqrt(size)
        if block == "full":
            part = part * signs(start, size, number)
        whole = np.eye(features)
        whole[start : start + size, start : start + size] = part
        matrix = whole @ matrix
    return matrix


# ---- packets --------------------------------------------------------------------------------------------------------


def rows_format(wire: golden.Format) -> golden.Format:
    """Of rows `[T, H + K]`: all features rotated, and the outliers as they are."""
    return replace(wire, prescaled=False)


def row_nbytes(wire: golden.Format, hidden: int, block: int | str) -> int:
    return golden.row_nbytes(rows_format(wire), hidden + wire.outliers) if block else golden.row_nbytes(wire, hidden)


def encode(
    x: np.ndarray, wire: golden.Format, block: int | str, factors: np.ndarray | None, outlier_index: np.ndarray | None
) -> np.ndarray:
    """Packet of rows with calibrated `factors [H]`, where they are prescaled."""
    hidden = x.shape[1]
    with np.errstate(all="ignore"):
        body = x * (F32(1) / factors) if wire.prescaled else x.copy()
    outliers = np.zeros((len(x), 0), F32)
    if wire.outliers:
        outliers = x[:, outlier_index]
        body[:, outlier_index] = 0
    rows = np.concatenate([butterflies(body, block), outliers], axis=1)
    return golden.encode(rows, rows_format(wire), None, np.arange(hidden, hidden + wire.outliers))


def decode_sum(
    packets: list[np.ndarray],
    hidden: int,
    wire: golden.Format,
    block: int | str,
    factors: np.ndarray | None,
    outlier_index: np.ndarray | None,
) -> np.ndarray:
    """Packets are summed as they are, rotated, and the sum is rotated back."""
    indices = np.arange(hidden, hidden + wire.outliers)
    rows = golden.decode_sum(packets, hidden + wire.outliers, rows_format(wire), None, indices)
    values = butterflies(rows[:, :hidden], block, inverse=True)
    with np.errstate(all="ignore"):
        values = values * factors if wire.prescaled else values
    if wire.outliers:
        values[:, outlier_index] = rows[:, hidden:]
    return canonical(values)
