"""Tensors as the compiled codec takes them: whether they fit, their addresses, and what its status codes mean.

Legend: T tokens, H hidden features, R ranks, B bytes of a row.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_kernels.cpu_library import CLayout

BF16, FP32, UINT8, INT64 = torch.bfloat16, torch.float32, torch.uint8, torch.int64
_NO_MEMORY = 1
_BAD_OUTLIER_INDEX = 2


def fits(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether it is what the C functions take. Where not, `checks.py` knows better, and what to say."""
    return tensor.dtype is dtype and tensor.is_cpu and tensor.shape == shape and tensor.stride()[-1] == 1


def _side_fits(tensor: Tensor | None, shape: tuple[int, ...] | None, dtype: torch.dtype) -> bool:
    if tensor is None or shape is None:
        return tensor is None and shape is None
    return fits(tensor, shape, dtype)


def static_fit(
    at: CLayout,
    scale: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
    minimum: Tensor | None,
) -> bool:
    return (
        _side_fits(scale, at.static, FP32)
        and _side_fits(body_index, at.body_index, INT64)
        and _side_fits(outlier_index, at.outlier_index, INT64)
        and _side_fits(minimum, at.minimum, FP32)
    )


def packets_fit(
    at: CLayout,
    tokens: int,
    packets_RTB: Tensor | Sequence[Tensor],
    scale_RH: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
    minimum_RH: Tensor | None,
) -> bool:
    shape, ranks = (tokens, at.row_nbytes), len(packets_RTB)
    if isinstance(packets_RTB, Tensor):
        fit = fits(packets_RTB, (ranks, *shape), UINT8)
    else:
        fit = all([fits(packet_TB, shape, UINT8) for packet_TB in packets_RTB])
    return (
        fit
        and ranks > 0
        and _side_fits(scale_RH, at.static and (ranks, *at.static), FP32)
        and _side_fits(body_index, at.body_index, INT64)
        and _side_fits(outlier_index, at.outlier_index, INT64)
        and _side_fits(minimum_RH, at.minimum and (ranks, *at.minimum), FP32)
    )


def rows_of(tensor_RH: Tensor | None) -> tuple[int | None, int]:
    """First row and the distance between rows."""
    return (None, 0) if tensor_RH is None else (tensor_RH.data_ptr(), tensor_RH.stride()[0])


def pointers(packets_RTB: Tensor | Sequence[Tensor]) -> tuple[bytes, bytes, int]:
    """R addresses and R distances between rows, as C arrays of 64-bit integers, and R."""
    ranks = len(packets_RTB)
    if isinstance(packets_RTB, Tensor):
        start, (packet_nbytes, row_nbytes, _) = packets_RTB.data_ptr(), packets_RTB.stride()
        starts = [start + rank * packet_nbytes for rank in range(ranks)]
        strides = [row_nbytes] * ranks
    else:
        starts = [packet_TB.data_ptr() for packet_TB in packets_RTB]
        strides = [packet_TB.stride()[0] for packet_TB in packets_RTB]
    return struct.pack(f"={ranks}Q", *starts), struct.pack(f"={ranks}q", *strides), ranks


def demand_cpu(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"the cpu codec got tensors on {tensor.device}; move them to the CPU or take another backend")


def raise_for(status: int, *outlier_indices: Tensor | None) -> None:
    if status == _BAD_OUTLIER_INDEX:
        given = " or ".join(str(index) for index in outlier_indices if index is not None)
        raise ValueError(f"outlier_index {given} must be ascending, without repeats, within the features")
    if status == _NO_MEMORY:
        raise MemoryError("no memory for the scratch rows of the codec")
