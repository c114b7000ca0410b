"""The codec for tensors on a CPU, in compiled C (`csrc/`), called with ctypes. `reference.py` holds the contract.

One thread a call; the GIL is released meanwhile. `body_index` is not read: it is the complement of `outlier_index`.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a row.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_kernels.checks import check_decode, check_decode_add_norm, check_decode_sum, check_encode, check_requantize
from lowbit_kernels.cpu_library import CLayout, c_layout, library
from lowbit_kernels.layout import PacketLayout

name = "cpu"

_BF16, _FP32, _UINT8, _INT64 = torch.bfloat16, torch.float32, torch.uint8, torch.int64
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
    at, shape = c_layout(layout), x_TH.shape
    if not (
        len(shape) == 2
        and (x_TH.dtype is _BF16 or x_TH.dtype is _FP32)
        and _fits(x_TH, (shape[0], at.features), x_TH.dtype)
        and _fits(packet_TB, (shape[0], at.row_nbytes), _UINT8)
        and _static_fit(at, inverse_scale, body_index, outlier_index, minimum)
    ):
        check_encode(x_TH, layout, packet_TB, inverse_scale, body_index, outlier_index, minimum)
        _demand_cpu(x_TH)
    is_bf16 = x_TH.dtype is _BF16
    status = library().lowbit_encode(
        at.struct,
        x_TH.data_ptr(),
        x_TH.stride()[0] * (2 if is_bf16 else 4),
        is_bf16,
        shape[0],
        packet_TB.data_ptr(),
        packet_TB.stride()[0],
        None if inverse_scale is None else inverse_scale.data_ptr(),
        None if minimum is None else minimum.data_ptr(),
        None if outlier_index is None else outlier_index.data_ptr(),
    )
    if status:
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
    at, shape = c_layout(layout), out_TH.shape
    if not (
        len(shape) == 2
        and _fits(out_TH, (shape[0], at.features), _FP32)
        and _fits(packet_TB, (shape[0], at.row_nbytes), _UINT8)
        and _static_fit(at, scale, body_index, outlier_index, minimum)
    ):
        check_decode(packet_TB, layout, out_TH, scale, body_index, outlier_index, minimum)
        _demand_cpu(out_TH)
    status = library().lowbit_decode(
        at.struct,
        packet_TB.data_ptr(),
        packet_TB.stride()[0],
        shape[0],
        out_TH.data_ptr(),
        out_TH.stride()[0],
        None if scale is None else scale.data_ptr(),
        None if minimum is None else minimum.data_ptr(),
        None if outlier_index is None else outlier_index.data_ptr(),
        add,
    )
    if status:
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
    at, shape = c_layout(layout), out_TH.shape
    if not (
        len(shape) == 2
        and _fits(out_TH, (shape[0], at.features), _FP32)
        and _packets_fit(at, shape[0], packets_RTB, scale_RH, body_index, outlier_index, minimum_RH)
    ):
        check_decode_sum(packets_RTB, layout, out_TH, scale_RH, body_index, outlier_index, minimum_RH)
        _demand_cpu(out_TH)
    status = library().lowbit_decode_sum(
        at.struct,
        *_pointers(packets_RTB),
        shape[0],
        out_TH.data_ptr(),
        out_TH.stride()[0],
        *_rows(scale_RH),
        *_rows(minimum_RH),
        None if outlier_index is None else outlier_index.data_ptr(),
        0,
    )
    if status:
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
    at, to, shape = c_layout(layout), c_layout(gather_layout), packet_TB.shape
    if not (
        len(shape) == 2
        and at.features == to.features
        and _fits(packet_TB, (shape[0], to.row_nbytes), _UINT8)
        and _static_fit(to, gather_inverse_scale, gather_body_index, gather_outlier_index, gather_minimum)
        and _packets_fit(at, shape[0], packets_RTB, scale_RH, body_index, outlier_index, minimum_RH)
    ):
        check_requantize(
            packets_RTB, layout, packet_TB, gather_layout, scale_RH, body_index, outlier_index, minimum_RH,
            gather_inverse_scale, gather_body_index, gather_outlier_index, gather_minimum,
        )  # fmt: skip
        _demand_cpu(packet_TB)
    status = library().lowbit_requantize(
        at.struct,
        *_pointers(packets_RTB),
        shape[0],
        *_rows(scale_RH),
        *_rows(minimum_RH),
        None if outlier_index is None else outlier_index.data_ptr(),
        to.struct,
        packet_TB.data_ptr(),
        packet_TB.stride()[0],
        None if gather_inverse_scale is None else gather_inverse_scale.data_ptr(),
        None if gather_minimum is None else gather_minimum.data_ptr(),
        None if gather_outlier_index is None else gather_outlier_index.data_ptr(),
    )
    if status:
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


def _fits(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether it is what the C functions take. Where not, `checks.py` knows better, and what to say."""
    return tensor.dtype is dtype and tensor.is_cpu and tensor.shape == shape and tensor.stride()[-1] == 1


def _side_fits(tensor: Tensor | None, shape: tuple[int, ...] | None, dtype: torch.dtype) -> bool:
    if tensor is None or shape is None:
        return tensor is None and shape is None
    return _fits(tensor, shape, dtype)


def _static_fit(
    at: CLayout,
    scale: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
    minimum: Tensor | None,
) -> bool:
    return (
        _side_fits(scale, at.static, _FP32)
        and _side_fits(body_index, at.body_index, _INT64)
        and _side_fits(outlier_index, at.outlier_index, _INT64)
        and _side_fits(minimum, at.minimum, _FP32)
    )


def _packets_fit(
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
        fit = _fits(packets_RTB, (ranks, *shape), _UINT8)
    else:
        fit = all([_fits(packet_TB, shape, _UINT8) for packet_TB in packets_RTB])
    return (
        fit
        and ranks > 0
        and _side_fits(scale_RH, at.static and (ranks, *at.static), _FP32)
        and _side_fits(body_index, at.body_index, _INT64)
        and _side_fits(outlier_index, at.outlier_index, _INT64)
        and _side_fits(minimum_RH, at.minimum and (ranks, *at.minimum), _FP32)
    )


def _rows(tensor_RH: Tensor | None) -> tuple[int | None, int]:
    """First row and the distance between rows."""
    return (None, 0) if tensor_RH is None else (tensor_RH.data_ptr(), tensor_RH.stride()[0])


def _pointers(packets_RTB: Tensor | Sequence[Tensor]) -> tuple[bytes, bytes, int]:
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


def _demand_cpu(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"the cpu codec got tensors on {tensor.device}; move them to the CPU or take another backend")


def _raise(status: int, *outlier_indices: Tensor | None) -> None:
    if status == _BAD_OUTLIER_INDEX:
        given = " or ".join(str(index) for index in outlier_indices if index is not None)
        raise ValueError(f"outlier_index {given} must be ascending, without repeats, within the features")
    if status == _NO_MEMORY:
        raise MemoryError("no memory for the scratch rows of the codec")
