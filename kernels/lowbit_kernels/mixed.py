"""Packets of mixed features: a row is rotated before it is encoded, and a sum of packets is rotated back.

`Composed` is the definition, of the codec of any backend and its `rotate`; compiled C does a row at a time, in cache.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a packet row.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast

import torch
from torch import Tensor

from lowbit_kernels.backends import Backend
from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.rotation import Rotation, get_rotate


@dataclass(frozen=True)
class Mixing:
    """How rows `[T, H]` become those of a packet, `[T, H + K]`: H mixed features, and K outliers behind them.

    factor_H: fp32 above 0, which features are divided by before, or None. outlier_index: int64 `[K]`, ascending:
    features that travel as they are, and are 0 where they are mixed, or None. They are taken out before, because one
    large feature would raise all that it is mixed with.
    """

    rotation: Rotation
    factor_H: Tensor | None = None
    outlier_index: Tensor | None = None

    @cached_property
    def inverse_factor_H(self) -> Tensor | None:
        """Mixing multiplies by it, as encoding does by inverse scales."""
        return None if self.factor_H is None else 1.0 / self.factor_H

    @property
    def outliers(self) -> int:
        return 0 if self.outlier_index is None else self.outlier_index.shape[0]

    @cached_property
    def places(self) -> tuple[Tensor | None, Tensor | None]:
        """`body_index` and `outlier_index` of the packet's rows."""
        if self.outlier_index is None:
            return None, None
        hidden = self.rotation.features
        places = torch.arange(hidden + self.outliers, device=self.outlier_index.device)
        return places[:hidden], places[hidden:]


class Mixed(Protocol):
    """What `get_mixed` returns. `Composed` holds the contract."""

    def encode_mixed(self, x_TH: Tensor, layout: PacketLayout, packet_TB: Tensor, mixing: Mixing) -> None: ...

    def decode_mixed(
        self,
        packets_RTB: Tensor | Sequence[Tensor],
        layout: PacketLayout,
        out_TH: Tensor,
        mixing: Mixing,
        add: bool = False,
    ) -> None: ...


@dataclass(frozen=True)
class Composed:
    """Of a codec, what goes with it, and torch between their calls."""

    codec: Backend

    def encode_mixed(self, x_TH: Tensor, layout: PacketLayout, packet_TB: Tensor, mixing: Mixing) -> None:
        """Write fp32 or bf16 `x_TH` into a packet whose layout is that of the mixed rows.

        Raises ValueError for a layout or tensors that do not fit.
        """
        check_mixed("x_TH", x_TH, (torch.float32, torch.bfloat16), layout, mixing)
        tokens, hidden = x_TH.shape
        rows = torch.empty(tokens, layout.features, device=x_TH.device)
        body_TH = rows[:, :hidden]
        if mixing.inverse_factor_H is None:
            body_TH.copy_(x_TH)
        else:
            torch.mul(x_TH, mixing.inverse_factor_H, out=body_TH)
        if mixing.outlier_index is not None:
            body_TH.index_fill_(1, mixing.outlier_index, 0.0)
            rows[:, hidden:] = x_TH.index_select(1, mixing.outlier_index)
        get_rotate(self.codec)(body_TH, mixing.rotation)
        self.codec.encode(rows, layout, packet_TB, None, *mixing.places)

    def decode_mixed(
        self,
        packets_RTB: Tensor | Sequence[Tensor],
        layout: PacketLayout,
        out_TH: Tensor,
        mixing: Mixing,
        add: bool = False,
    ) -> None:
        """Write the sum of R packets, in rank order, into fp32 `out_TH`, or add it to what that holds.

        Packets are added as they arrive; the sum is rotated back, once, and multiplied by the factors.
        Raises ValueError for a layout or tensors that do not fit.
        """
        check_mixed("out_TH", out_TH, (torch.float32,), layout, mixing)
        tokens, hidden = out_TH.shape
        rows = torch.empty(tokens, layout.features, device=out_TH.device)
        self.codec.decode_sum(packets_RTB, layout, rows, None, *mixing.places)
        body_TH = rows[:, :hidden]
        get_rotate(self.codec)(body_TH, mixing.rotation, inverse=True)
        if mixing.factor_H is not None:
            body_TH *= mixing.factor_H
        if mixing.outlier_index is not None:
            body_TH[:, mixing.outlier_index] = rows[:, hidden:]
        out_TH.copy_(out_TH.add_(body_TH) if add else body_TH)
        out_TH.masked_fill_(out_TH.isnan(), torch.nan)  # hardware disagrees about NaN bits


def get_mixed(codec: Backend) -> Mixed:
    """What goes with a codec from `get_backend`: compiled C with that, else `Composed`."""
    if codec.name == "cpu":
        return cast(Mixed, importlib.import_module("lowbit_kernels.cpu_mixed"))
    return Composed(codec)


def check_mixed(
    name: str, values_TH: Tensor, dtypes: Sequence[torch.dtype], layout: PacketLayout, mixing: Mixing
) -> None:
    """Raise ValueError for anything that does not fit, but for packets, which a codec checks."""
    hidden, outliers = mixing.rotation.features, mixing.outliers
    if (layout.features, layout.outliers) != (hidden + outliers, outliers) or layout.needs_static:
        raise ValueError(
            f"a layout of {layout.features} features, {layout.outliers} of them outliers, does not hold mixed rows of "
            f"{hidden} features and {outliers} outliers; expected {hidden + outliers}, {outliers}, no static scales"
        )
    if values_TH.dtype not in dtypes or values_TH.dim() != 2 or values_TH.shape[1] != hidden:
        found = f"{values_TH.dtype} {tuple(values_TH.shape)}"
        raise ValueError(f"{name} is {found}; expected {' or '.join(map(str, dtypes))} [T, {hidden}]")
    if hidden > 1 and values_TH.numel() and values_TH.stride(1) != 1:
        raise ValueError(f"{name} has strides {values_TH.stride()}; the elements of a row must be adjacent")
    for side, dtype, count in ((mixing.factor_H, torch.float32, hidden), (mixing.outlier_index, torch.int64, outliers)):
        if side is not None and (side.dtype is not dtype or side.shape != (count,) or not side.is_contiguous()):
            raise ValueError(f"a factor or index is {side.dtype} {tuple(side.shape)}; expected {dtype} ({count},)")
