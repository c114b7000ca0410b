"""`rotation.rotate` in compiled C (`csrc/rotate.h`), for rows on a CPU. Same name, same bits.

Legend: T tokens, H hidden features.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from lowbit_kernels.cpu_arguments import demand_cpu
from lowbit_kernels.cpu_library import library
from lowbit_kernels.rotation import Rotation, check_rows, sign_bits

_CPU = torch.device("cpu")


class CRuns:
    """`Run` of csrc/rotate.h, one after the other. It holds the addresses of `signs`."""

    def __init__(self, rotation: Rotation) -> None:
        self.signs = [None if run.number is None else _one_bit_each(sign_bits(run, _CPU)) for run in rotation.runs]
        numbers: list[int] = []
        for run, signs in zip(rotation.runs, self.signs, strict=True):
            numbers += [run.start, run.size, run.count, 0 if signs is None else signs.data_ptr()]
        self.struct = (ctypes.c_int64 * len(numbers))(*numbers)


def _one_bit_each(bits: Tensor) -> Tensor:
    """int32 words, 32 values to a word, low bits first."""
    flags = torch.zeros(-(-bits.shape[0] // 32) * 32, dtype=torch.int64)
    flags[: bits.shape[0]] = bits < 0
    return (flags.view(-1, 32) << torch.arange(32)).sum(dim=1).to(torch.int32)


#: Kept for good, since C reads them at their addresses.
c_runs = functools.cache(CRuns)


def rotate(rows_TH: Tensor, rotation: Rotation, inverse: bool = False) -> None:
    """See `rotation.rotate`."""
    check_rows(rows_TH, rotation)
    demand_cpu(rows_TH)
    library().lowbit_rotate(
        rows_TH.data_ptr(),
        rows_TH.stride(0),
        rows_TH.shape[0],
        c_runs(rotation).struct,
        len(rotation.runs),
        inverse,
    )
