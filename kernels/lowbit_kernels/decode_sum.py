"""Triton: decode R packets and sum them in fp32 in rank order, in one launch. One program is one tile of one row.

Packets that do not lie at equal distances cost one launch each, the sum waiting in the output in between: an array of
addresses would have to be copied to the device, which a CUDA graph cannot replay.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a row.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.checks import check_decode_sum
from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.pack import NAN_BITS, check_alignment, load_bf16, load_code, one_nan

TILE = 1024
OUTLIER_TILE = tl.constexpr(128)


def decode_sum(
    packets_RTB: Tensor | Sequence[Tensor],
    layout: PacketLayout,
    out_TH: Tensor,
    scale_RH: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
) -> None:
    """See `reference.decode_sum`. Also ValueError for packet rows that are not aligned for their widest values."""
    packets = check_decode_sum(packets_RTB, layout, out_TH, scale_RH, body_index, outlier_index)
    for packet_TB in packets:
        check_alignment(packet_TB, layout)
    addresses = [packet_TB.data_ptr() for packet_TB in packets]
    distance = addresses[1] - addresses[0] if len(packets) > 1 else 0
    even = all(address - addresses[0] == r * distance for r, address in enumerate(addresses))
    if even and len({packet_TB.stride(0) for packet_TB in packets}) == 1:
        _launch(packets[0], distance, len(packets), layout, out_TH, scale_RH, body_index, outlier_index, first=True)
        return
    for r, packet_TB in enumerate(packets):
        scale = None if scale_RH is None else scale_RH[r : r + 1]
        _launch(packet_TB, 0, 1, layout, out_TH, scale, body_index, outlier_index, first=r == 0)


def _launch(
    packet_TB: Tensor,
    distance_nbytes: int,
    ranks: int,
    layout: PacketLayout,
    out_TH: Tensor,
    scale_RH: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
    first: bool,
) -> None:
    tokens = out_TH.shape[0]
    if tokens == 0:
        return
    _decode_sum[(tokens, max(1, triton.cdiv(layout.body, TILE)))](
        packet_TB,
        packet_TB.stride(0),
        distance_nbytes,
        ranks,
        out_TH.view(torch.int32),
        out_TH.stride(0),
        scale_RH,
        0 if scale_RH is None else scale_RH.stride(0),
        body_index,
        outlier_index,
        layout.body,
        layout.outliers,
        layout.group_size,
        layout.scales_offset,
        layout.outliers_offset,
        BITS=layout.bits,
        GROUPED=layout.group_size > 0,
        HAS_OUTLIERS=layout.outliers > 0,
        FIRST=first,
        TILE=TILE,
        num_warps=4,
        enable_fp_fusion=False,  # a product that overflows must not be rescued by the addition
    )


@triton.jit
def _decode_sum(
    packet_ptr: tl.tensor,
    packet_stride: tl.tensor,
    distance_nbytes: tl.tensor,
    ranks: tl.tensor,
    out_ptr: tl.tensor,
    out_stride: tl.tensor,
    scale_ptr: tl.tensor,
    scale_stride: tl.tensor,
    body_index_ptr: tl.tensor,
    outlier_index_ptr: tl.tensor,
    body: tl.tensor,
    outliers: tl.tensor,
    group_size: tl.tensor,
    scales_offset: tl.tensor,
    outliers_offset: tl.tensor,
    BITS: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr,
    FIRST: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    out_row = out_ptr + token * out_stride
    value = tile * TILE + tl.arange(0, TILE)
    mask = value < body
    feature = value
    if HAS_OUTLIERS:
        feature = tl.load(body_index_ptr + value, mask=mask, other=0)
    if FIRST:  # -0.0 + v is v for every v, -0.0 included
        total = tl.full((TILE,), -0.0, tl.float32)
    else:
        total = tl.load(out_row + feature, mask=mask, other=0).to(tl.float32, bitcast=True)
    row = packet_ptr + token * packet_stride
    if BITS <= 8 and not GROUPED:
        scale_row = scale_ptr
    for _ in range(ranks):
        if BITS == 32:
            bits = tl.load(row.to(tl.pointer_type(tl.int32)) + value, mask=mask, other=0)
            decoded = bits.to(tl.float32, bitcast=True)
        elif BITS == 16:
            decoded = load_bf16(row, 0, value, mask).to(tl.float32, bitcast=True)
        else:
            code = load_code(row, value, mask, BITS)
            if GROUPED:
                scale = load_bf16(row, scales_offset, value // group_size, mask).to(tl.float32, bitcast=True)
                decoded = code.to(tl.float32) * scale
            else:
                decoded = code.to(tl.float32) * tl.load(scale_row + value, mask=mask, other=0.0)
                NOT_FINITE: tl.constexpr = -8 if BITS == 4 else -128
                bits = tl.where(code == NOT_FINITE, NAN_BITS, decoded.to(tl.int32, bitcast=True))
                decoded = bits.to(tl.float32, bitcast=True)
                scale_row += scale_stride
        total += decoded
        row += distance_nbytes
    tl.store(out_row + feature, one_nan(total.to(tl.int32, bitcast=True)), mask=mask)

    if HAS_OUTLIERS and tile == 0:
        for start in range(0, outliers, OUTLIER_TILE):
            k = start + tl.arange(0, OUTLIER_TILE)
            outlier_mask = k < outliers
            outlier = tl.load(outlier_index_ptr + k, mask=outlier_mask, other=0)
            if FIRST:
                outlier_total = tl.full((OUTLIER_TILE,), -0.0, tl.float32)
            else:
                outlier_total = tl.load(out_row + outlier, mask=outlier_mask, other=0).to(tl.float32, bitcast=True)
            row = packet_ptr + token * packet_stride
            for _ in range(ranks):
                outlier_total += load_bf16(row, outliers_offset, k, outlier_mask).to(tl.float32, bitcast=True)
                row += distance_nbytes
            tl.store(out_row + outlier, one_nan(outlier_total.to(tl.int32, bitcast=True)), mask=outlier_mask)
