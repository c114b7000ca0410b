"""The whole method on a plain list of tensors, no processes: what every test of the collectives compares with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from lowbit_kernels import Backend
from lowbit_kernels import reference as kernels
from lowbit_kernels.mixed import Composed, Mixing
from lowbit_kernels.rotation import Rotation
from megatron_lowbit.comm.constants import SyncPointConstants
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.comm.wire_format import WireFormat

# Shapes: T tokens, H hidden features, D body features, R ranks, B bytes of a packet row.


def encode(
    x_TH: torch.Tensor,
    wire: WireFormat,
    constants: SyncPointConstants,
    scale_D: torch.Tensor | None,
    minimum_D: torch.Tensor | None = None,
) -> torch.Tensor:
    """The packet `[T, B]` of `x_TH`."""
    layout = wire.packet_layout(x_TH.shape[1])
    packet_TB = torch.empty(x_TH.shape[0], layout.row_nbytes, dtype=torch.uint8)
    if wire.rotation:
        _mixed().encode_mixed(x_TH, layout, packet_TB, _mixing(wire, x_TH.shape[1], constants, scale_D))
        return packet_TB
    body, outliers = (constants.body_index, constants.outlier_index) if layout.outliers else (None, None)
    kernels.encode(x_TH, layout, packet_TB, None if scale_D is None else 1.0 / scale_D, body, outliers, minimum_D)
    return packet_TB


def decode_sum(
    packets: Sequence[torch.Tensor],
    hidden: int,
    wire: WireFormat,
    constants: SyncPointConstants,
    scale_RD: torch.Tensor | None,
    minimum_RD: torch.Tensor | None = None,
) -> torch.Tensor:
    """FP32 sum `[T, H]` of packets in rank order; of a rotated format rotated back once, behind the sum."""
    layout = wire.packet_layout(hidden)
    out_TH = torch.empty(packets[0].shape[0], hidden)
    if wire.rotation:
        _mixed().decode_mixed(packets, layout, out_TH, _mixing(wire, hidden, constants, _row(scale_RD, 0)))
        return out_TH
    body, outliers = (constants.body_index, constants.outlier_index) if layout.outliers else (None, None)
    kernels.decode_sum(packets, layout, out_TH, scale_RD, body, outliers, minimum_RD)
    return out_TH


def quantise(
    x_TH: torch.Tensor,
    wire: WireFormat,
    constants: SyncPointConstants,
    scale_D: torch.Tensor | None,
    minimum_D: torch.Tensor | None = None,
) -> torch.Tensor:
    """What arrives when `x_TH` is sent: encoded to a packet and decoded again, FP32 `[T, H]`."""
    packet_TB = encode(x_TH, wire, constants, scale_D, minimum_D)
    static = (None if side is None else side[None] for side in (scale_D, minimum_D))
    return decode_sum([packet_TB], x_TH.shape[1], wire, constants, *static)


def all_reduce(partials: Sequence[torch.Tensor], scheme: CommScheme, constants: SyncPointConstants) -> torch.Tensor:
    """FP32 `[T, H]`: what every rank holds after the collective, given each rank's partial `[T, H]`."""
    wire, hidden = scheme.reduce_stage, partials[0].shape[1]
    scale_RD, minimum_RD = constants.reduce_scale_RD, constants.reduce_minimum_RD
    packets = [
        encode(partial_TH, wire, constants, _row(scale_RD, 0 if wire.rotation else rank), _row(minimum_RD, rank))
        for rank, partial_TH in enumerate(partials)
    ]
    sum_TH = decode_sum(packets, hidden, wire, constants, scale_RD, minimum_RD)
    if scheme.gather_stage is None:
        return sum_TH
    static = _row(constants.gather_scale_1D, 0), _row(constants.gather_minimum_1D, 0)
    return quantise(sum_TH, scheme.gather_stage, constants, *static)


def _mixed() -> Composed:
    return Composed(cast(Backend, kernels))


def _mixing(wire: WireFormat, hidden: int, constants: SyncPointConstants, factor_H: torch.Tensor | None) -> Mixing:
    outliers = constants.outlier_index if wire.outlier_count(hidden) else None
    return Mixing(Rotation(hidden, wire.rotation), factor_H, outliers)


def _row(constants_RD: torch.Tensor | None, sender: int) -> torch.Tensor | None:
    return None if constants_RD is None else constants_RD[sender]
