"""The codec as torch operators, `torch.ops.lowbit_kernels.*`: to torch.compile one node each, instead of a graph break.

Every step has two forms: `NAME` returns new tensors, `NAME_out` writes into those of the caller that its schema
declares mutable. An operator takes no dataclass, so a layout travels as text (`layout_text`). `reference.py` holds the
contract of the steps; `backend` is "auto", for the device of the tensors, or a name. `Operators` is a backend that
calls them while torch.compile looks on.

Importing this registers the operators, which is all it does. Not through `torch.library.custom_op`, whose wrapper adds
10 us to a call on a CPU where this adds 2 to 6 (AMD EPYC, torch 2.13): encoding a short row takes 5.

Legend: T tokens, H hidden features, R ranks, B bytes of a packet row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.backends import Backend, get_backend
from lowbit_kernels.layout import PacketLayout

NAMESPACE = "lowbit_kernels"


def layout_text(layout: PacketLayout) -> str:
    """`layout` as the operators take it; `layout_of` reads it back. Spelt out so that torch.compile can trace it."""
    return (
        f"{layout.features},{layout.bits},{layout.group_size},{layout.outliers},{layout.values},"
        f"{layout.scale_format},{int(layout.asymmetric)},{int(layout.prescaled)}"
    )


@functools.lru_cache(maxsize=256)
def layout_of(text: str) -> PacketLayout:
    """The layout of `layout_text`. Raises ValueError for any other text."""
    parts = text.split(",")
    names = [field.name for field in fields(PacketLayout)]
    if len(parts) != len(names):
        raise ValueError(f"layout text {text!r} has {len(parts)} parts; expected {','.join(names)} (see layout_text)")
    numbers = [int(part) for part in parts[:4] + parts[6:]]
    return PacketLayout(*numbers[:4], *parts[4:6], *map(bool, numbers[4:]))  # type: ignore[arg-type]


# ---- what runs ----
# `static` are the tensors that the schemas below name between the layout and the options.


@functools.cache  # looking one up takes longer than encoding a short row
def _backend(name: str, device: torch.device) -> Backend:
    return get_backend(name, device)


def _encode(x_TH: Tensor, layout: str, packet_TB: Tensor, *static: Tensor | None, backend: str = "auto") -> None:
    _backend(backend, x_TH.device).encode(x_TH, layout_of(layout), packet_TB, *static)


def _decode(
    packet_TB: Tensor,
    layout: str,
    out_TH: Tensor,
    scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum: Tensor | None = None,
    *,
    add: bool = False,
    backend: str = "auto",
) -> None:
    codec = _backend(backend, out_TH.device)
    codec.decode(packet_TB, layout_of(layout), out_TH, scale, body_index, outlier_index, minimum, add)


def _decode_sum(
    packets_RTB: Sequence[Tensor], layout: str, out_TH: Tensor, *static: Tensor | None, backend: str = "auto"
) -> None:
    _backend(backend, out_TH.device).decode_sum(packets_RTB, layout_of(layout), out_TH, *static)


def _requantize(
    packets_RTB: Sequence[Tensor],
    layout: str,
    packet_TB: Tensor,
    gather_layout: str,
    *static: Tensor | None,
    backend: str = "auto",
    **gather: Tensor | None,
) -> None:
    _backend(backend, packet_TB.device).requantize(
        packets_RTB, layout_of(layout), packet_TB, layout_of(gather_layout), *static, **gather
    )


def _decode_add_norm(
    packet_TB: Tensor,
    layout: str,
    residual_TH: Tensor,
    normed_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum: Tensor | None = None,
    *,
    bias_H: Tensor | None = None,
    backend: str = "auto",
) -> None:
    static = (scale, body_index, outlier_index, minimum, bias_H)
    codec = _backend(backend, residual_TH.device)
    codec.decode_add_norm(packet_TB, layout_of(layout), residual_TH, normed_TH, weight_H, eps, *static)


# ---- the tensors that come out ----


def _packet(like: Tensor, layout: str) -> Tensor:
    return like.new_empty((like.shape[0], layout_of(layout).row_nbytes), dtype=torch.uint8)


def _new_packet(x_TH: Tensor, layout: str, *static: Tensor | None, **options: Any) -> Tensor:
    return _packet(x_TH, layout)


def _new_values(packet_TB: Tensor, layout: str, *static: Tensor | None, **options: Any) -> Tensor:
    return packet_TB.new_empty((packet_TB.shape[0], layout_of(layout).features), dtype=torch.float32)


def _new_sum(packets_RTB: Sequence[Tensor], layout: str, *static: Tensor | None, **options: Any) -> Tensor:
    return _new_values(packets_RTB[0], layout)


def _new_gather_packet(
    packets_RTB: Sequence[Tensor], layout: str, gather_layout: str, *static: Tensor | None, **options: Any
) -> Tensor:
    return _packet(packets_RTB[0], gather_layout)


def _new_normed(
    packet_TB: Tensor,
    layout: str,
    residual_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    dtype: torch.dtype,
    *static: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    return residual_TH.new_empty(residual_TH.shape), residual_TH.new_empty(residual_TH.shape, dtype=dtype)


def _returning(write: Callable[..., None], new: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The form that returns what `write` writes into its third argument."""

    def step(source: Tensor | Sequence[Tensor], layout: str, *rest: Any, **options: Any) -> Tensor:
        out = new(source, layout, *rest)
        write(source, layout, out, *rest, **options)
        return out

    return step


def _returning_normed(
    packet_TB: Tensor,
    layout: str,
    residual_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    dtype: torch.dtype,
    *static: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    added_TH, normed_TH = _new_normed(packet_TB, layout, residual_TH, weight_H, eps, dtype)
    added_TH.copy_(residual_TH)
    _decode_add_norm(packet_TB, layout, added_TH, normed_TH, weight_H, eps, *static, **options)
    return added_TH, normed_TH


# ---- the operators ----


def _writes_nothing_new(*arguments: Any, **options: Any) -> None:
    """What a step that writes into the caller's tensors looks like without its values."""


def _schemas() -> dict[str, tuple[Callable[..., Any], Callable[..., Any], str]]:
    """By name: what runs, what it returns without values, its parameters and results."""
    backend = 'str backend="auto"'
    static = "Tensor? {0}=None, Tensor? body_index=None, Tensor? outlier_index=None, Tensor? {1}=None"
    encode = f"{static.format('inverse_scale', 'minimum')}, *, {backend}"
    decode = f"{static.format('scale', 'minimum')}, *"
    total = f"{static.format('scale_RH', 'minimum_RH')}, *, {backend}"
    gather = ", ".join(
        f"Tensor? gather_{name}=None" for name in ("inverse_scale", "body_index", "outlier_index", "minimum")
    )
    norm = f"Tensor weight_H, float eps, {{}}{decode}, Tensor? bias_H=None, {backend}"
    return {
        "encode": (_returning(_encode, _new_packet), _new_packet, f"Tensor x_TH, str layout, {encode}) -> Tensor"),
        "encode_out": (
            *(_encode, _writes_nothing_new),
            f"Tensor x_TH, str layout, Tensor(a!) packet_TB, {encode}) -> ()",
        ),
        "decode": (
            *(_returning(_decode, _new_values), _new_values),
            f"Tensor packet_TB, str layout, {decode}, {backend}) -> Tensor",
        ),
        "decode_out": (
            *(_decode, _writes_nothing_new),
            f"Tensor packet_TB, str layout, Tensor(a!) out_TH, {decode}, bool add=False, {backend}) -> ()",
        ),
        "decode_sum": (
            *(_returning(_decode_sum, _new_sum), _new_sum),
            f"Tensor[] packets_RTB, str layout, {total}) -> Tensor",
        ),
        "decode_sum_out": (
            *(_decode_sum, _writes_nothing_new),
            f"Tensor[] packets_RTB, str layout, Tensor(a!) out_TH, {total}) -> ()",
        ),
        "requantize": (
            *(_returning(_requantize, _new_gather_packet), _new_gather_packet),
            f"Tensor[] packets_RTB, str layout, str gather_layout, {total}, {gather}) -> Tensor",
        ),
        "requantize_out": (
            *(_requantize, _writes_nothing_new),
            f"Tensor[] packets_RTB, str layout, Tensor(a!) packet_TB, str gather_layout, {total}, {gather}) -> ()",
        ),
        "decode_add_norm": (
            *(_returning_normed, _new_normed),
            f"Tensor packet_TB, str layout, Tensor residual_TH, {norm.format('ScalarType dtype, ')}) "
            "-> (Tensor, Tensor)",
        ),
        "decode_add_norm_out": (
            *(_decode_add_norm, _writes_nothing_new),
            f"Tensor packet_TB, str layout, Tensor(a!) residual_TH, Tensor(b!) normed_TH, {norm.format('')}) -> ()",
        ),
    }


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, (runs, without_values, signature) in _schemas().items():
        # compiled graphs must hand over rows whose elements are adjacent, as eager code does
        library.define(f"{name}({signature}", tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
        library.impl(name, runs, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", without_values, lib=library)
    return library


OPERATORS = tuple(_schemas())
_LIBRARY = _register()  # the operators live as long as this does
