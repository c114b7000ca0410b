"""`foretell.Composed` in compiled C: rows pass the cache once, products are of integers. Same names, same bits.

Legend: T tokens, H hidden features, K numbers between a predictor's two products, R ranks, B bytes of a packet row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_kernels.checks import (
    check_decode,
    check_encode,
    check_foretell,
    check_missed,
    check_requantize,
    check_share,
)
from lowbit_kernels.cpu_arguments import demand_cpu, pointers, raise_for, rows_of
from lowbit_kernels.cpu_library import c_layout, library
from lowbit_kernels.foretell import Coefficients, Share
from lowbit_kernels.layout import PacketLayout

_SHARE = ctypes.c_int64 * 7


def foretell_codes(
    input_TH: Tensor, input_scale_H: Tensor, first: Coefficients, offset_K: Tensor, factor_K: Tensor
) -> Tensor:
    """See `Composed.foretell_codes`."""
    check_foretell(input_TH, input_scale_H, first.values_IO, offset_K, factor_K)
    demand_cpu(input_TH)
    (tokens, hidden), width = input_TH.shape, offset_K.shape[0]
    codes_TK = torch.empty(tokens, width, dtype=torch.int8)
    status = library().lowbit_foretell_codes(
        input_TH.data_ptr(),
        input_TH.stride(0) * input_TH.element_size(),
        input_TH.dtype is torch.bfloat16,
        tokens,
        input_scale_H.data_ptr(),
        first.packed.data_ptr(),
        hidden,
        width,
        offset_K.data_ptr(),
        factor_K.data_ptr(),
        codes_TK.data_ptr(),
    )
    if status:
        raise_for(status)
    return codes_TK


def encode_feedback(
    x_TH: Tensor,
    layout: PacketLayout,
    packet_TB: Tensor,
    share: Share | None,
    missed_TH: Tensor | None,
    inverse_scale: Tensor | None = None,
    scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum: Tensor | None = None,
) -> None:
    """See `Composed.encode_feedback`; of `share` and `missed_TH` at least one is given."""
    assert share is not None or missed_TH is not None
    check_encode(x_TH, layout, packet_TB, inverse_scale, body_index, outlier_index, minimum)
    demand_cpu(x_TH)
    check_missed("missed_TH", missed_TH, layout, scale, x_TH)
    status = library().lowbit_encode_feedback(
        c_layout(layout).struct,
        x_TH.data_ptr(),
        x_TH.stride(0) * x_TH.element_size(),
        x_TH.dtype is torch.bfloat16,
        x_TH.shape[0],
        packet_TB.data_ptr(),
        packet_TB.stride(0),
        _address(inverse_scale),
        _address(scale),
        _address(minimum),
        _address(outlier_index),
        _share(share, layout, x_TH.shape[0]),
        *rows_of(missed_TH),
    )
    if status:
        raise_for(status, outlier_index)


def requantize_feedback(
    packets_RTB: Tensor | Sequence[Tensor],
    layout: PacketLayout,
    packet_TB: Tensor,
    gather_layout: PacketLayout,
    owed_TH: Tensor,
    scale_RH: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum_RH: Tensor | None = None,
    *,
    gather_inverse_scale: Tensor | None = None,
    gather_scale: Tensor | None = None,
    gather_body_index: Tensor | None = None,
    gather_outlier_index: Tensor | None = None,
    gather_minimum: Tensor | None = None,
) -> None:
    """See `Composed.requantize_feedback`."""
    check_requantize(
        packets_RTB, layout, packet_TB, gather_layout, scale_RH, body_index, outlier_index, minimum_RH,
        gather_inverse_scale, gather_body_index, gather_outlier_index, gather_minimum,
    )  # fmt: skip
    demand_cpu(packet_TB)
    check_missed("owed_TH", owed_TH, gather_layout, gather_scale, packet_TB)
    status = library().lowbit_requantize_feedback(
        c_layout(layout).struct,
        *pointers(packets_RTB),
        packet_TB.shape[0],
        *rows_of(scale_RH),
        *rows_of(minimum_RH),
        _address(outlier_index),
        c_layout(gather_layout).struct,
        packet_TB.data_ptr(),
        packet_TB.stride(0),
        _address(gather_inverse_scale),
        _address(gather_scale),
        _address(gather_minimum),
        _address(gather_outlier_index),
        *rows_of(owed_TH),
    )
    if status:
        raise_for(status, outlier_index, gather_outlier_index)


def decode_foretold(
    packet_TB: Tensor,
    layout: PacketLayout,
    out_TH: Tensor,
    share: Share,
    scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum: Tensor | None = None,
) -> None:
    """See `Composed.decode_foretold`."""
    check_decode(packet_TB, layout, out_TH, scale, body_index, outlier_index, minimum)
    demand_cpu(out_TH)
    status = library().lowbit_decode_foretold(
        c_layout(layout).struct,
        packet_TB.data_ptr(),
        packet_TB.stride(0),
        out_TH.shape[0],
        out_TH.data_ptr(),
        out_TH.stride(0),
        _address(scale),
        _address(minimum),
        _address(outlier_index),
        _share(share, layout, out_TH.shape[0]),
    )
    if status:
        raise_for(status, outlier_index)


def _share(share: Share | None, layout: PacketLayout, tokens: int) -> object:
    """`Share` of csrc/feedback.h. It holds addresses: what they belong to is the caller's argument."""
    if share is None:
        return None
    check_share(share.codes_TK, share.coefficients.values_IO, share.scale_H, tokens, layout.features)
    coefficients = share.coefficients
    matrix = (coefficients.packed.data_ptr(), *coefficients.values_IO.shape, coefficients.width)
    return _SHARE(share.codes_TK.data_ptr(), share.codes_TK.stride(0), *matrix, share.scale_H.data_ptr())


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
