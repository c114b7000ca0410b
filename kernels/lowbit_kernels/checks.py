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
    minimum: Tensor | None,
) -> None:
    """Raise TypeError for an x that is neither fp32 nor bf16, ValueError for anything else that does not fit."""
    if x_TH.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"x_TH is {x_TH.dtype}; encode takes torch.float32 or torch.bfloat16")
    if x_TH.dim() != 2:
        raise ValueError(f"x_TH has shape {tuple(x_TH.shape)}; expected [T, {layout.features}]")
    tokens = x_TH.shape[0]
    _rows("x_TH", x_TH, (tokens, layout.features), x_TH.dtype, x_TH.device)
    _rows("packet_TB", packet_TB, (tokens, layout.row_nbytes), torch.uint8, x_TH.device)
    _static("inverse_scale", inverse_scale, "minimum", minimum, layout, (), x_TH.device)
    _indices("", layout, body_index, outlier_index, x_TH.device)


def check_decode(
    packet_TB: Tensor,
    layout: PacketLayout,
    out_TH: Tensor,
    scale: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
    minimum: Tensor | None,
) -> None:
    """Raise ValueError for anything that does not fit."""
    _out("out_TH", out_TH, layout)
    _rows("packet_TB", packet_TB, (out_TH.shape[0], layout.row_nbytes), torch.uint8, out_TH.device)
    _static("scale", scale, "minimum", minimum, layout, (), out_TH.device)
    _indices("", layout, body_index, outlier_index, out_TH.device)


def check_decode_sum(
    packets_RTB: Tensor | Sequence[Tensor],
    layout: PacketLayout,
    out_TH: Tensor,
    scale_RH: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
    minimum_RH: Tensor | None,
) -> list[Tensor]:
    """Raise ValueError for anything that does not fit; return the packets as a list of R tensors [T, B] (views)."""
    _out("out_TH", out_TH, layout)
    return _packets(
        packets_RTB, layout, out_TH.shape[0], out_TH.device, scale_RH, body_index, outlier_index, minimum_RH
    )


def check_requantize(
    packets_RTB: Tensor | Sequence[Tensor],
    layout: PacketLayout,
    packet_TB: Tensor,
    gather_layout: PacketLayout,
    scale_RH: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
    minimum_RH: Tensor | None,
    gather_inverse_scale: Tensor | None,
    gather_body_index: Tensor | None,
    gather_outlier_index: Tensor | None,
    gather_minimum: Tensor | None,
) -> list[Tensor]:
    """Raise ValueError for anything that does not fit; return the packets as a list of R tensors [T, B] (views)."""
    if gather_layout.features != layout.features:
        raise ValueError(
            f"gather_layout has {gather_layout.features} features, layout has {layout.features}; they must be equal"
        )
    if packet_TB.dim() != 2:
        raise ValueError(f"packet_TB has shape {tuple(packet_TB.shape)}; expected [T, {gather_layout.row_nbytes}]")
    tokens, device = packet_TB.shape[0], packet_TB.device
    _rows("packet_TB", packet_TB, (tokens, gather_layout.row_nbytes), torch.uint8, device)
    _static("gather_inverse_scale", gather_inverse_scale, "gather_minimum", gather_minimum, gather_layout, (), device)
    _indices("gather_", gather_layout, gather_body_index, gather_outlier_index, device)
    return _packets(packets_RTB, layout, tokens, device, scale_RH, body_index, outlier_index, minimum_RH)


def check_decode_add_norm(
    packet_TB: Tensor,
    layout: PacketLayout,
    residual_TH: Tensor,
    normed_TH: Tensor,
    weight_H: Tensor,
    scale: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
    minimum: Tensor | None,
    bias_H: Tensor | None,
) -> None:
    """Raise TypeError for a normed_TH that is neither fp32 nor bf16, ValueError for anything else that does not fit."""
    _out("residual_TH", residual_TH, layout)
    device = residual_TH.device
    if normed_TH.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"normed_TH is {normed_TH.dtype}; decode_add_norm writes torch.float32 or torch.bfloat16")
    _rows("normed_TH", normed_TH, tuple(residual_TH.shape), normed_TH.dtype, device)
    _rows("weight_H", weight_H, (layout.features,), torch.float32, device)
    if bias_H is not None:
        _rows("bias_H", bias_H, (layout.features,), torch.float32, device)
    check_decode(packet_TB, layout, residual_TH, scale, body_index, outlier_index, minimum)


def _packets(
    packets_RTB: Tensor | Sequence[Tensor],
    layout: PacketLayout,
    tokens: int,
    device: torch.device,
    scale_RH: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
    minimum_RH: Tensor | None,
) -> list[Tensor]:
    packets = list(packets_RTB.unbind(0) if isinstance(packets_RTB, Tensor) else packets_RTB)
    if not packets:
        raise ValueError("packets_RTB holds no packet; a sum needs at least 1")
    for packet_TB in packets:
        _rows("packets_RTB[r]", packet_TB, (tokens, layout.row_nbytes), torch.uint8, device)
    _static("scale_RH", scale_RH, "minimum_RH", minimum_RH, layout, (len(packets),), device)
    _indices("", layout, body_index, outlier_index, device)
    return packets


def _out(name: str, out_TH: Tensor, layout: PacketLayout) -> None:
    if out_TH.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(out_TH.shape)}; expected [T, {layout.features}]")
    _rows(name, out_TH, (out_TH.shape[0], layout.features), torch.float32, out_TH.device)


def _rows(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Any distance between rows is fine (a packet may be a view), the elements of a row must be adjacent."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; expected {dtype} {shape} on {device}"
        )
    if shape[-1] > 1 and tensor.numel() and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()}; the elements of a row must be adjacent (.contiguous())"
        )


def _static(
    scale_name: str,
    scale: Tensor | None,
    minimum_name: str,
    minimum: Tensor | None,
    layout: PacketLayout,
    senders: tuple[int, ...],
    device: torch.device,
) -> None:
    """The static scales and minimums: one row for each of `senders`, or a single vector where that is empty."""
    shape = (*senders, layout.body)
    _side(scale_name, scale, shape if layout.needs_static else None, torch.float32, device)
    _side(minimum_name, minimum, shape if layout.needs_minimum else None, torch.float32, device)


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
    prefix: str, layout: PacketLayout, body_index: Tensor | None, outlier_index: Tensor | None, device: torch.device
) -> None:
    with_outliers = layout.outliers > 0
    _side(f"{prefix}body_index", body_index, (layout.body,) if with_outliers else None, torch.int64, device)
    _side(f"{prefix}outlier_index", outlier_index, (layout.outliers,) if with_outliers else None, torch.int64, device)


def check_foretell(
    input_TH: Tensor, input_scale_H: Tensor, first_HK: Tensor, offset_K: Tensor, factor_K: Tensor
) -> None:
    """Raise TypeError for inputs that are neither fp32 nor bf16, ValueError for anything else that does not fit."""
    if input_TH.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"input_TH is {input_TH.dtype}; foretell_codes reads torch.float32 or torch.bfloat16")
    if first_HK.dim() != 2 or input_TH.dim() != 2:
        raise ValueError(f"input_TH is {tuple(input_TH.shape)}, first {tuple(first_HK.shape)}; give [T, H] and [H, K]")
    (hidden, width), device = first_HK.shape, input_TH.device
    _rows("input_TH", input_TH, (input_TH.shape[0], hidden), input_TH.dtype, device)
    _rows("first", first_HK, (hidden, width), torch.int8, device)
    _rows("input_scale_H", input_scale_H, (hidden,), torch.float32, device)
    _rows("offset_K", offset_K, (width,), torch.float32, device)
    _rows("factor_K", factor_K, (width,), torch.float32, device)


def check_share(codes_TK: Tensor, values_KH: Tensor, scale_H: Tensor, tokens: int, features: int) -> None:
    """Raise ValueError for anything that does not fit."""
    if values_KH.dtype not in (torch.int8, torch.int16) or values_KH.dim() != 2 or values_KH.shape[1] != features:
        raise ValueError(
            f"coefficients are {values_KH.dtype} {tuple(values_KH.shape)}; expected int8 or int16 [K, {features}]"
        )
    _rows("codes_TK", codes_TK, (tokens, values_KH.shape[0]), torch.int8, values_KH.device)
    _rows("scale_H", scale_H, (features,), torch.float32, values_KH.device)


def check_missed(name: str, missed_TH: Tensor | None, layout: PacketLayout, scale: Tensor | None, x: Tensor) -> None:
    """Raise ValueError for anything that does not fit. scale: what packets are decoded with. x: has the same tokens."""
    if missed_TH is not None:
        _rows(name, missed_TH, (x.shape[0], layout.features), torch.float32, x.device)
    _side("scale", scale, (layout.body,) if layout.needs_static else None, torch.float32, x.device)
