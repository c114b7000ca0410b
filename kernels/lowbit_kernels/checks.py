"""What every backend demands of its arguments, so that the same mistake gives the same error on each of them.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_kernels.layout import PacketLayout


def check_encode(
    x_TH: Tensor,
    layout: PacketLayout,
    packet_TB: Tensor,
    inverse_scale: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
) -> None:
    """Raise TypeError for an x that is neither fp32 nor bf16, ValueError for anything else that does not fit."""
    if x_TH.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"x_TH is {x_TH.dtype}; encode takes torch.float32 or torch.bfloat16")
    if x_TH.dim() != 2:
        raise ValueError(f"x_TH has shape {tuple(x_TH.shape)}; expected [T, {layout.features}]")
    tokens = x_TH.shape[0]
    _rows("x_TH", x_TH, (tokens, layout.features), x_TH.dtype, x_TH.device)
    _rows("packet_TB", packet_TB, (tokens, layout.row_nbytes), torch.uint8, x_TH.device)
    shape = (layout.body,) if layout.static_scales else None
    _side("inverse_scale", inverse_scale, shape, torch.float32, x_TH.device)
    _indices(layout, body_index, outlier_index, x_TH.device)


def check_decode(
    packet_TB: Tensor,
    layout: PacketLayout,
    out_TH: Tensor,
    scale: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
) -> None:
    """Raise ValueError for anything that does not fit."""
    _out(out_TH, layout)
    _rows("packet_TB", packet_TB, (out_TH.shape[0], layout.row_nbytes), torch.uint8, out_TH.device)
    shape = (layout.body,) if layout.static_scales else None
    _side("scale", scale, shape, torch.float32, out_TH.device)
    _indices(layout, body_index, outlier_index, out_TH.device)


def check_decode_sum(
    packets_RTB: Tensor | Sequence[Tensor],
    layout: PacketLayout,
    out_TH: Tensor,
    scale_RH: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
) -> list[Tensor]:
    """Raise ValueError for anything that does not fit; return the packets as a list of R tensors [T, B] (views)."""
    packets = list(packets_RTB.unbind(0) if isinstance(packets_RTB, Tensor) else packets_RTB)
    if not packets:
        raise ValueError("packets_RTB holds no packet; decode_sum needs at least 1")
    _out(out_TH, layout)
    for packet_TB in packets:
        _rows("packets_RTB[r]", packet_TB, (out_TH.shape[0], layout.row_nbytes), torch.uint8, out_TH.device)
    shape = (len(packets), layout.body) if layout.static_scales else None
    _side("scale_RH", scale_RH, shape, torch.float32, out_TH.device)
    _indices(layout, body_index, outlier_index, out_TH.device)
    return packets


def _out(out_TH: Tensor, layout: PacketLayout) -> None:
    if out_TH.dim() != 2:
        raise ValueError(f"out_TH has shape {tuple(out_TH.shape)}; expected [T, {layout.features}]")
    _rows("out_TH", out_TH, (out_TH.shape[0], layout.features), torch.float32, out_TH.device)


def _rows(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Any distance between rows is fine (a packet may be a view), the elements of a row must be adjacent."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected {dtype} {shape} on {device}"
        )
    if shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()}; the elements of a row must be adjacent (.contiguous())"
        )


def _side(
    name: str, tensor: Tensor | None, shape: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device
) -> None:
    """A static tensor beside the data: demanded with exactly this shape, or forbidden where `shape` is None."""
    if shape is None:
        if tensor is not None:
            raise ValueError(f"{name} was given, but this layout has no use for it; pass None")
        return
    if tensor is None:
        raise ValueError(f"{name} is missing; this layout needs {dtype} {shape}")
    _rows(name, tensor, shape, dtype, device)


def _indices(
    layout: PacketLayout, body_index: Tensor | None, outlier_index: Tensor | None, device: torch.device
) -> None:
    with_outliers = layout.outliers > 0
    _side("body_index", body_index, (layout.body,) if with_outliers else None, torch.int64, device)
    _side("outlier_index", outlier_index, (layout.outliers,) if with_outliers else None, torch.int64, device)
