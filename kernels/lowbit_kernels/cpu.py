"""The codec for tensors on a CPU, in compiled C (`csrc/`), called with ctypes. `reference.py` holds the contract.

One thread a call; the GIL is released meanwhile. `body_index` is not read: it is the complement of `outlier_index`.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_kernels.checks import check_decode, check_decode_add_norm, check_decode_sum, check_encode, check_requantize
from lowbit_kernels.cpu_arguments import (
    BF16,
    FP32,
    UINT8,
    demand_cpu,
    fits,
    packets_fit,
    pointers,
    raise_for,
    rows_of,
    static_fit,
)
from lowbit_kernels.cpu_library import c_layout, library
from lowbit_kernels.layout import PacketLayout

name = "cpu"


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
        and (x_TH.dtype is BF16 or x_TH.dtype is FP32)
        and fits(x_TH, (shape[0], at.features), x_TH.dtype)
        and fits(packet_TB, (shape[0], at.row_nbytes), UINT8)
        and static_fit(at, inverse_scale, body_index, outlier_index, minimum)
    ):
        check_encode(x_TH, layout, packet_TB, inverse_scale, body_index, outlier_index, minimum)
        demand_cpu(x_TH)
    is_bf16 = x_TH.dtype is BF16
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
        raise_for(status, outlier_index)


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
        and fits(out_TH, (shape[0], at.features), FP32)
        and fits(packet_TB, (shape[0], at.row_nbytes), UINT8)
        and static_fit(at, scale, body_index, outlier_index, minimum)
    ):
        check_decode(packet_TB, layout, out_TH, scale, body_index, outlier_index, minimum)
        demand_cpu(out_TH)
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
        raise_for(status, outlier_index)


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
        and fits(out_TH, (shape[0], at.features), FP32)
        and packets_fit(at, shape[0], packets_RTB, scale_RH, body_index, outlier_index, minimum_RH)
    ):
        check_decode_sum(packets_RTB, layout, out_TH, scale_RH, body_index, outlier_index, minimum_RH)
        demand_cpu(out_TH)
    status = library().lowbit_decode_sum(
        at.struct,
        *pointers(packets_RTB),
        shape[0],
        out_TH.data_ptr(),
        out_TH.stride()[0],
        *rows_of(scale_RH),
        *rows_of(minimum_RH),
        None if outlier_index is None else outlier_index.data_ptr(),
        0,
    )
    if status:
        raise_for(status, outlier_index)


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
        and fits(packet_TB, (shape[0], to.row_nbytes), UINT8)
        and static_fit(to, gather_inverse_scale, gather_body_index, gather_outlier_index, gather_minimum)
        and packets_fit(at, shape[0], packets_RTB, scale_RH, body_index, outlier_index, minimum_RH)
    ):
        check_requantize(
            packets_RTB, layout, packet_TB, gather_layout, scale_RH, body_index, outlier_index, minimum_RH,
            gather_inverse_scale, gather_body_index, gather_outlier_index, gather_minimum,
        )  # fmt: skip
        demand_cpu(packet_TB)
    status = library().lowbit_requantize(
        at.struct,
        *pointers(packets_RTB),
        shape[0],
        *rows_of(scale_RH),
        *rows_of(minimum_RH),
        None if outlier_index is None else outlier_index.data_ptr(),
        to.struct,
        packet_TB.data_ptr(),
        packet_TB.stride()[0],
        None if gather_inverse_scale is None else gather_inverse_scale.data_ptr(),
        None if gather_minimum is None else gather_minimum.data_ptr(),
        None if gather_outlier_index is None else gather_outlier_index.data_ptr(),
    )
    if status:
        raise_for(status, outlier_index, gather_outlier_index)


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
