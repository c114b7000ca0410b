"""The codec for tensors on a CPU, in compiled C (`csrc/`), called with ctypes. `reference.py` holds the contract.

One thread a call; the GIL is released meanwhile. `body_index` is not read: it is the complement of `outlier_index`.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a row.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from lowbit_kernels.checks import check_decode, check_decode_sum, check_encode
from lowbit_kernels.layout import PacketLayout

name = "cpu"

_FIELDS = (
    *("features", "bits", "group_size", "outliers"),
    *("body", "codes_nbytes", "scales_offset", "outliers_offset", "row_nbytes"),
)
_NO_MEMORY = 1
_BAD_OUTLIER_INDEX = 2


class _Layout(ctypes.Structure):
    _fields_ = [(field, ctypes.c_int64) for field in _FIELDS]


def why_missing(device: torch.device) -> str:
    """An empty string where this backend can serve `device`, else the reason, with the way out."""
    if device.type != "cpu":
        return "it takes tensors on a CPU only"
    try:
        _library()
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
) -> None:
    """See `reference.encode`. Also ValueError for an `outlier_index` that is not ascending within 0..H-1."""
    check_encode(x_TH, layout, packet_TB, inverse_scale, body_index, outlier_index)
    _demand_cpu(x_TH)
    status = _library().lowbit_encode(
        _c_layout(layout),
        x_TH.data_ptr(),
        x_TH.stride(0) * x_TH.element_size(),
        x_TH.dtype == torch.bfloat16,
        x_TH.shape[0],
        packet_TB.data_ptr(),
        packet_TB.stride(0),
        _pointer(inverse_scale),
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
) -> None:
    """See `reference.decode`. Also ValueError for an `outlier_index` that is not ascending within 0..H-1."""
    check_decode(packet_TB, layout, out_TH, scale, body_index, outlier_index)
    _decode_sum([packet_TB], layout, out_TH, scale, 0, outlier_index)


def decode_sum(
    packets_RTB: Tensor | Sequence[Tensor],
    layout: PacketLayout,
    out_TH: Tensor,
    scale_RH: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
) -> None:
    """See `reference.decode_sum`. Also ValueError for an `outlier_index` that is not ascending within 0..H-1."""
    packets = check_decode_sum(packets_RTB, layout, out_TH, scale_RH, body_index, outlier_index)
    scale_stride = 0 if scale_RH is None else scale_RH.stride(0)
    _decode_sum(packets, layout, out_TH, scale_RH, scale_stride, outlier_index)


def _decode_sum(
    packets: list[Tensor],
    layout: PacketLayout,
    out_TH: Tensor,
    scale: Tensor | None,
    scale_stride: int,
    outlier_index: Tensor | None,
) -> None:
    _demand_cpu(out_TH)
    ranks = len(packets)
    status = _library().lowbit_decode_sum(
        _c_layout(layout),
        (ctypes.c_void_p * ranks)(*[packet_TB.data_ptr() for packet_TB in packets]),
        (ctypes.c_int64 * ranks)(*[packet_TB.stride(0) for packet_TB in packets]),
        ranks,
        out_TH.shape[0],
        out_TH.data_ptr(),
        out_TH.stride(0),
        _pointer(scale),
        scale_stride,
        _pointer(outlier_index),
    )
    _raise(status, outlier_index)


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled library, from the folder of this package. Raises FileNotFoundError, saying how to build it."""
    folder = Path(__file__).parent
    paths = [folder / f"_codec{suffix}" for suffix in EXTENSION_SUFFIXES]
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"the compiled codec is not in {folder}; install a C compiler (gcc or clang), then pip install again"
        )
    library = ctypes.CDLL(str(found))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    # Without types, a Python int would travel as a C int, which is too short for a pointer.
    library.lowbit_encode.argtypes = [
        *(pointer, pointer, integer, ctypes.c_int, integer, pointer, integer, pointer, pointer)
    ]
    library.lowbit_decode_sum.argtypes = [
        *(pointer, pointer, pointer, integer, integer, pointer, integer, pointer, integer, pointer)
    ]
    return library


@functools.lru_cache(maxsize=64)
def _c_layout(layout: PacketLayout) -> ctypes.Array:
    """The layout as C sees it, by reference. Filling it in takes longer than encoding a short row."""
    return (_Layout * 1)(_Layout(*[getattr(layout, field) for field in _FIELDS]))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _demand_cpu(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"the cpu codec got tensors on {tensor.device}; move them to the CPU or take another backend")


def _raise(status: int, outlier_index: Tensor | None) -> None:
    if status == _BAD_OUTLIER_INDEX:
        raise ValueError(f"outlier_index {outlier_index} must be ascending, without repeats, within the features")
    if status == _NO_MEMORY:
        raise MemoryError("no memory for the scratch row of the codec")
