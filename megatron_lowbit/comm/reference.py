"""The whole method on a plain list of tensors, no processes: what every test of the collectives compares with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowbit_kernels import reference as kernels
from megatron_lowbit.comm.constants import SyncPointConstants
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.comm.wire_format import WireFormat

# Shapes: T tokens, H hidden features, D body features, R ranks, B bytes of a packet row.


def quantise(
    x_TH: torch.Tensor,
    wire: WireFormat,
    constants: SyncPointConstants,
    scale_D: torch.Tensor | None,
    minimum_D: torch.Tensor | None = None,
) -> torch.Tensor:
    """What arrives when `x_TH` is sent: encoded to a packet and decoded again, FP32 `[T, H]`."""
    layout = wire.packet_layout(x_TH.shape[1])
    body, outliers = (constants.body_index, constants.outlier_index) if layout.outliers else (None, None)
    packet_TB = torch.empty(x_TH.shape[0], layout.row_nbytes, dtype=torch.uint8)
    kernels.encode(x_TH, layout, packet_TB, None if scale_D is None else 1.0 / scale_D, body, outliers, minimum_D)
    out_TH = torch.empty(x_TH.shape)
    kernels.decode(packet_TB, layout, out_TH, scale_D, body, outliers, minimum_D)
    return out_TH


def all_reduce(partials: Sequence[torch.Tensor], scheme: CommScheme, constants: SyncPointConstants) -> torch.Tensor:
    """FP32 `[T, H]`: what every rank holds after the collective, given each rank's partial `[T, H]`."""
    sum_TH: torch.Tensor | None = None
    for rank, partial_TH in enumerate(partials):
        static = _row(constants.reduce_scale_RD, rank), _row(constants.reduce_minimum_RD, rank)
        received_TH = quantise(partial_TH, scheme.reduce_stage, constants, *static)
        sum_TH = received_TH if sum_TH is None else sum_TH + received_TH
    assert sum_TH is not None
    if scheme.gather_stage is None:
        return torch.where(sum_TH.isnan(), torch.nan, sum_TH)  # Inf - Inf: one bit pattern for NaN, as in a packet
    static = _row(constants.gather_scale_1D, 0), _row(constants.gather_minimum_1D, 0)
    return quantise(sum_TH, scheme.gather_stage, constants, *static)


def _row(constants_RD: torch.Tensor | None, sender: int) -> torch.Tensor | None:
    return None if constants_RD is None else constants_RD[sender]
