"""The codec for tensors on a CPU, in compiled C (`csrc/`), called with ctypes. `reference.py` holds the contract.

One thread a call; the GIL is released meanwhile. `body_index` is not read: it is the complement of `outlier_index`.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_kernels.checks import check_decode, check_decode_add_norm, check_decode_sum, check_encode, check_requantize
from lowbit_kernels.cpu_library import c_layout, library
from lowbit_kernels.layout import PacketLayout

name = "cpu"

_NO_MEMORY = 1
_BAD_OUTLIER_INDEX = 2


def why_missing(device: torch.device) -> str:
    """An empty string where this backend can serve `device`, else the reason, with the way out."""
    if device.type != "cpu":
        return "it takes tensors on a CPU only"
    try:
        library()
    except FileNotFoundError as error:
        return str(error)
    return ""


def encode(
    x_TH: Tensor,
    layout: PacketLayout,
    packet_TB: Tensor,
    inverse_scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum: Tensor | None = None,
) -> None:
    """See `reference.encode`. Also ValueError for an `outlier_index` that is not ascending within 0..H-1."""
    check_encode(x_TH, layout, packet_TB, inverse_scale, body_index, outlier_index, minimum)
    _demand_cpu(x_TH)
    status = library().lowbit_encode(
        c_layout(layout),
        x_TH.data_ptr(),
        x_TH.stride(0) * x_TH.element_size(),
        x_TH.dtype == torch.bfloat16,
        x_TH.shape[0],
        packet_TB.data_ptr(),
        packet_TB.stride(0),
        _pointer(inverse_scale),
        _pointer(minimum),
        _pointer(outlier_index),
    )
    _raise(status, outlier_index)


def decode(
    packet_TB: Tensor,
    layout: PacketLayout,
    out_TH: Tensor,
    scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum: Tensor | None = None,
    add: bool = False,
) -> None:
    """See `reference.decode`. Also ValueError for an `outlier_index` that is not ascending within 0..H-1."""
    check_decode(packet_TB, layout, out_TH, scale, body_index, outlier_index, minimum)
    _demand_cpu(out_TH)
    status = library().lowbit_decode(
        c_layout(layout),
        packet_TB.data_ptr(),
        packet_TB.stride(0),
        out_TH.shape[0],
        out_TH.data_ptr(),
        out_TH.stride(0),
        _pointer(scale),
        _pointer(minimum),
        _pointer(outlier_index),
        add,
    )
    _raise(status, outlier_index)


def decode_sum(
    packets_RTB: Tensor | Sequence[Tensor],
    layout: PacketLayout,
    out_TH: Tensor,
    scale_RH: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum_RH: Tensor | None = None,
) -> None:
    """See `reference.decode_sum`. Also ValueError for an `outlier_index` that is not ascending within 0..H-1."""
    packets = check_decode_sum(packets_RTB, layout, out_TH, scale_RH, body_index, outlier_index, minimum_RH)
    _demand_cpu(out_TH)
    status = library().lowbit_decode_sum(
        c_layout(layout),
        *_pointers(packets),
        out_TH.shape[0],
        out_TH.data_ptr(),
        out_TH.stride(0),
        *_rows(scale_RH),
        *_rows(minimum_RH),
        _pointer(outlier_index),
        0,
    )
    _raise(status, outlier_index)


def requantize(
    packets_RTB: Tensor | Sequence[Tensor],
    layout: PacketLayout,
    packet_TB: Tensor,
    gather_layout: PacketLayout,
    scale_RH: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum_RH: Tensor | None = None,
    *,
    gather_inverse_scale: Tensor | None = None,
    gather_body_index: Tensor | None = None,
    gather_outlier_index: Tensor | None = None,
    gather_minimum: Tensor | None = None,
) -> None:
    """See `reference.requantize`. Also ValueError for indices that are not ascending within 0..H-1."""
    packets = check_requantize(
        packets_RTB, layout, packet_TB, gather_layout, scale_RH, body_index, outlier_index, minimum_RH,
        gather_inverse_scale, gather_body_index, gather_outlier_index, gather_minimum,
    )  # fmt: skip
    _demand_cpu(packet_TB)
    status = library().lowbit_requantize(
        c_layout(layout),
        *_pointers(packets),
        packet_TB.shape[0],
        *_rows(scale_RH),
        *_rows(minimum_RH),
        _pointer(outlier_index),
        c_layout(gather_layout),
        packet_TB.data_ptr(),
        packet_TB.stride(0),
        _pointer(gather_inverse_scale),
        _pointer(gather_minimum),
        _pointer(gather_outlier_index),
    )
    _raise(status, outlier_index, gather_outlier_index)


def decode_add_norm(
    packet_TB: Tensor,
    layout: PacketLayout,
    residual_TH: Tensor,
    normed_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum: Tensor | None = None,
    bias_H: Tensor | None = None,
) -> None:
    """See `reference.decode_add_norm`. Composed: torch's norm is as fast as the memory."""
    check_decode_add_norm(
        packet_TB, layout, residual_TH, normed_TH, weight_H, scale, body_index, outlier_index, minimum, bias_H
    )
    if bias_H is None:
        decode(packet_TB, layout, residual_TH, scale, body_index, outlier_index, minimum, add=True)
    else:  # the bias joins the decoded values first
        values_TH = torch.empty(residual_TH.shape)
        decode(packet_TB, layout, values_TH, scale, body_index, outlier_index, minimum)
        residual_TH += values_TH.add_(bias_H)
        residual_TH.masked_fill_(residual_TH.isnan(), torch.nan)  # hardware disagrees about NaN bits
    normed_TH.copy_(torch.nn.functional.rms_norm(residual_TH, weight_H.shape, weight_H, eps))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows(tensor_RH: Tensor | None) -> tuple[int | None, int]:
    """First row and the distance between rows."""
    return (None, 0) if tensor_RH is None else (tensor_RH.data_ptr(), tensor_RH.stride(0))


def _pointers(packets: list[Tensor]) -> tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_int64], int]:
    ranks = len(packets)
    starts = (ctypes.c_void_p * ranks)(*[packet_TB.data_ptr() for packet_TB in packets])
    return starts, (ctypes.c_int64 * ranks)(*[packet_TB.stride(0) for packet_TB in packets]), ranks


def _demand_cpu(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"the cpu codec got tensors on {tensor.device}; move them to the CPU or take another backend")


def _raise(status: int, *outlier_indices: Tensor | None) -> None:
    if status == _BAD_OUTLIER_INDEX:
        given = " or ".join(str(index) for index in outlier_indices if index is not None)
        raise ValueError(f"outlier_index {given} must be ascending, without repeats, within the features")
    if status == _NO_MEMORY:
        raise MemoryError("no memory for the scratch rows of the codec")
