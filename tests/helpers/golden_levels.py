"""Code books in NumPy, for `golden.py`: it compares with every threshold, in FP64. The levels are the project's.

"tc" is a dynamic program over the three last bits, written from the formula of a code's level: it tries every level.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from lowbit_kernels.codebooks import levels

CODE_BOOKS = ("lm", "nf4", "tc")


def level_codes(values: np.ndarray, book: str, bits: int) -> np.ndarray:
    """How many midpoints of neighbouring levels lie below each value; what is NaN is below none. A row is a group."""
    if book == "tc":
        return _trellis_codes(values, bits)
    table = np.array(levels(book, bits), np.float64)
    assert len(table) == 2**bits
    codes = np.zeros(values.shape, np.int64)
    for low, high in pairwise(table):
        codes += values.astype(np.float64) > (low + high) / 2
    return codes


def _place(code: int, one: int, two: int, three: int) -> int:
    """Which level a code stands for, from it and those one, two and three before it (or their lowest bits)."""
    return 4 * (code >> 1) + 2 * ((code ^ two ^ three) & 1) + (one & 1)


def _trellis_codes(values: np.ndarray, bits: int) -> np.ndarray:
    """Of groups `[N, S]`. A state is the bits of the last three codes, the oldest first."""
    table = np.array(levels("tc", bits), np.float32)
    states = list(np.ndindex(2, 2, 2))
    best = {state: np.full(len(values), np.inf, np.float32) for state in states}
    best[0, 0, 0] = np.zeros(len(values), np.float32)
    paths = {state: np.zeros((len(values), 0), np.int64) for state in states}
    for x in values.T:
        after, ways = {}, {}
        for state in states:
            oldest = [(first, *state[:2]) for first in (0, 1)]
            costs, codes = [], []
            for three, two, one in oldest:
                choices = [2 * high + state[2] for high in range(2 ** (bits - 1))]
                reached = [float(table[_place(code, one, two, three)]) for code in choices]
                near = sum((x.astype(np.float64) > (low + high) / 2).astype(int) for low, high in pairwise(reached))
                error = x - np.array(reached, np.float32)[near]
                costs.append(best[three, two, one] + error * error)
                codes.append(np.array(choices)[near])
            later = costs[1] < costs[0]
            after[state] = np.where(later, costs[1], costs[0])
            path = np.where(later[:, None], paths[oldest[1]], paths[oldest[0]])
            ways[state] = np.column_stack((path, np.where(later, codes[1], codes[0])))
        best, paths = after, ways
    last = np.argmin(np.stack([best[state] for state in states]), axis=0)
    return np.stack([paths[state] for state in states])[last, np.arange(len(values))]


def level_values(codes: np.ndarray, book: str, bits: int, group: int = 0) -> np.ndarray:
    if book == "tc":
        before = np.pad(codes, ((0, 0), (3, 0)))
        at = np.arange(codes.shape[1]) % group
        one, two, three = (np.where(at >= k, before[:, 3 - k : before.shape[1] - k], 0) for k in (1, 2, 3))
        return np.array(levels(book, bits), np.float32)[_place(codes, one, two, three)]
    return np.array(levels(book, bits), np.float32)[codes]
