"""`mixed.Composed` in compiled C (`csrc/mixed.h`): a row passes the cache once. Same names, same bits.

Legend: T tokens, H hidden features, R ranks, B bytes of a packet row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_kernels.cpu_arguments import UINT8, demand_cpu, fits, packets_fit, pointers, raise_for
from lowbit_kernels.cpu_library import c_layout, library
from lowbit_kernels.cpu_rotation import c_runs
from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.mixed import Mixing, check_mixed

_MIXING = ctypes.c_int64 * 4


def encode_mixed(x_TH: Tensor, layout: PacketLayout, packet_TB: Tensor, mixing: Mixing) -> None:
    """See `Composed.encode_mixed`. Also ValueError for an `outlier_index` that is not ascending within 0..H-1."""
    check_mixed("x_TH", x_TH, (torch.float32, torch.bfloat16), layout, mixing)
    demand_cpu(x_TH)
    if not fits(packet_TB, (x_TH.shape[0], layout.row_nbytes), UINT8):
        raise ValueError(
            f"packet_TB is {packet_TB.dtype} {tuple(packet_TB.shape)} with strides {packet_TB.stride()}; expected "
            f"torch.uint8 {(x_TH.shape[0], layout.row_nbytes)} on the CPU, the bytes of a row adjacent"
        )
    status = library().lowbit_encode_mixed(
        c_layout(layout).struct,
        x_TH.data_ptr(),
        x_TH.stride(0) * x_TH.element_size(),
        x_TH.dtype is torch.bfloat16,
        x_TH.shape[0],
        packet_TB.data_ptr(),
        packet_TB.stride(0),
        _address(mixing.places[1]),
        _mixing(mixing, mixing.inverse_factor_H),
    )
    if status:
        raise_for(status, mixing.outlier_index)


def decode_mixed(
    packets_RTB: Tensor | Sequence[Tensor], layout: PacketLayout, out_TH: Tensor, mixing: Mixing, add: bool = False
) -> None:
    """See `Composed.decode_mixed`. Also ValueError for an `outlier_index` that is not ascending within 0..H-1."""
    check_mixed("out_TH", out_TH, (torch.float32,), layout, mixing)
    demand_cpu(out_TH)
    if not packets_fit(c_layout(layout), out_TH.shape[0], packets_RTB, None, *mixing.places, None):
        raise ValueError(
            f"packets are {[(packet_TB.dtype, tuple(packet_TB.shape)) for packet_TB in packets_RTB]}; expected one or "
            f"more, each torch.uint8 {(out_TH.shape[0], layout.row_nbytes)} on the CPU, the bytes of a row adjacent"
        )
    status = library().lowbit_decode_mixed(
        c_layout(layout).struct,
        *pointers(packets_RTB),
        out_TH.shape[0],
        out_TH.data_ptr(),
        out_TH.stride(0),
        _address(mixing.places[1]),
        _mixing(mixing, mixing.factor_H),
        add,
    )
    if status:
        raise_for(status, mixing.outlier_index)


def _mixing(mixing: Mixing, factor_H: Tensor | None) -> object:
    """`Mixing` of csrc/mixed.h. It holds addresses: what they belong to is the caller's argument."""
    runs = ctypes.addressof(c_runs(mixing.rotation).struct)
    return _MIXING(_address(factor_H) or 0, _address(mixing.outlier_index) or 0, runs, len(mixing.rotation.runs))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
