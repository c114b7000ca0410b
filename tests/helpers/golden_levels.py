"""Code books in NumPy, for `golden.py`: it compares with every threshold, in FP64. The levels are the project's."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from lowbit_kernels.codebooks import levels

CODE_BOOKS = ("lm", "nf4")


def level_codes(values: np.ndarray, book: str, bits: int) -> np.ndarray:
    """How many midpoints of neighbouring levels lie below each value; what is NaN is below none."""
    table = np.array(levels(book, bits), np.float64)
    assert len(table) == 2**bits
    codes = np.zeros(values.shape, np.int64)
    for low, high in pairwise(table):
        codes += values.astype(np.float64) > (low + high) / 2
    return codes


def level_values(codes: np.ndarray, book: str, bits: int) -> np.ndarray:
    return np.array(levels(book, bits), np.float32)[codes]
