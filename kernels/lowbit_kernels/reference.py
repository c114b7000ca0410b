"""The codec in eager torch: the definition that every other backend must match bit for bit, on CPU and on CUDA.

Arguments that all functions share:
    layout: what a row of the packet looks like.
    inverse_scale (encode), scale (decode): fp32 `[H-K]` in body order, above 0 and finite, `scale` representable in
        bf16; given exactly where `layout.needs_static`.
    body_index, outlier_index: int64 `[H-K]` and `[K]`, ascending, together every feature once; None where K is 0.
    minimum: fp32 `[H-K]` in body order, representable in bf16; given exactly where `layout.needs_minimum`.
All raise ValueError for shapes that do not fit, for arguments that are missing or of no use to the layout.

No order of evaluation can change a bit: scales are representable in bf16, or the product of a bf16 number and an e4m3
one, so `code * scale` (at most 8 x 12 significant bits) is exact in fp32, and a fused multiply-add gives the same sum
unless the product overflows (the compiled backends forbid fusion for that); sums run in rank order. Every NaN that
comes out has the bits 0x7FC00000 (0x7FC0 as bf16), for hardware disagrees about NaN bits. Hosts are little endian.

Not for speed: it makes many temporaries. Source of the static format: arXiv 2411.07942, section 3.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_kernels.checks import (
    check_decode,
    check_decode_add_norm,
    check_decode_sum,
    check_encode,
    check_requantize,
)
from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.reference_codes import (
    GroupSides,
    decode_groups,
    decode_static,
    encode_groups,
    encode_static,
)
from lowbit_kernels.reference_floats import NAN_BF16_BITS, bf16_bits, bf16_values, one_nan, pack, unpack

name = "torch"


def encode(
    x_TH: Tensor,
    layout: PacketLayout,
    packet_TB: Tensor,
    inverse_scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum: Tensor | None = None,
) -> None:
    """Write `x_TH` (fp32 or bf16 `[T, H]`) into `packet_TB` (uint8 `[T, B]`, owned by the caller), padding included.

    Static scales: code = clamp(round_half_even(x * inverse_scale)), -7 to 7 at 4 bits, with the code below (-8) for
    values that are not finite; asymmetric (x - minimum) * inverse_scale, 0 to 14, with 15 for those. e4m3 and e2m1
    round to nearest even and saturate; not finite are e4m3's NaN and e2m1's minus zero.
    Group scales: see `reference_codes`; a group with a value that is not finite has the scale NaN, the minimum NaN and
    codes 0, and so has an asymmetric group whose minimum is beyond bf16. A minimum of zero is sent as +0. Prescaled
    layouts group `x * inverse_scale`. Levels of a code book: the code is how many thresholds `x * (1/scale)` exceeds.
    bf16 values round to nearest even, so a finite value beyond the range of bf16 becomes Inf.
    Raises TypeError for another dtype of x.
    """
    check_encode(x_TH, layout, packet_TB, inverse_scale, body_index, outlier_index, minimum)
    x_TH = x_TH.float()
    body = x_TH if body_index is None else x_TH.index_select(1, body_index)
    packet_TB.zero_()
    if layout.bits == 32:
        _write(packet_TB, 0, torch.where(torch.isnan(body), NAN_BF16_BITS << 16, body.contiguous().view(torch.int32)))
    elif layout.bits == 16:
        _write(packet_TB, 0, bf16_bits(body))
    elif layout.group_size:
        codes, sides = encode_groups(body if inverse_scale is None else body * inverse_scale, layout)
        _write(packet_TB, 0, pack(codes, layout.planes))
        _write(packet_TB, layout.scales_offset, sides.scale_TG)
        if sides.row_scale_T1 is not None:
            _write(packet_TB, layout.row_scale_offset, sides.row_scale_T1)
        if sides.minimum_TG is not None:
            _write(packet_TB, layout.minimums_offset, sides.minimum_TG)
    else:
        assert inverse_scale is not None
        _write(packet_TB, 0, pack(encode_static(body, layout, inverse_scale, minimum), layout.planes))
    if outlier_index is not None:
        _write(packet_TB, layout.outliers_offset, bf16_bits(x_TH.index_select(1, outlier_index)))


def decode(
    packet_TB: Tensor,
    layout: PacketLayout,
    out_TH: Tensor,
    scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum: Tensor | None = None,
    add: bool = False,
) -> None:
    """Write the values of `packet_TB` (uint8 `[T, B]`) into `out_TH` (fp32 `[T, H]`, owned by the caller).

    add: add them to what `out_TH` holds instead, one fp32 addition each.
    Any bytes decode to something: scales that are NaN give NaN, e8m0 bytes below 27 read as 27 (2^-100).
    """
    check_decode(packet_TB, layout, out_TH, scale, body_index, outlier_index, minimum)
    values_TH = _decoded(packet_TB, layout, scale, body_index, outlier_index, minimum)
    out_TH.copy_(one_nan(out_TH + values_TH) if add else values_TH)


def decode_sum(
    packets_RTB: Tensor | Sequence[Tensor],
    layout: PacketLayout,
    out_TH: Tensor,
    scale_RH: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum_RH: Tensor | None = None,
) -> None:
    """Write the sum of R packets, `((d0 + d1) + d2) + ...` in fp32 in this order, into `out_TH` (fp32 `[T, H]`).

    packets_RTB: a tensor `[R, T, B]`, or R tensors `[T, B]`.
    scale_RH, minimum_RH: fp32 `[R, H-K]`, each sender's in body order; given exactly where `layout.needs_static` and
        `layout.needs_minimum`.
    """
    packets = check_decode_sum(packets_RTB, layout, out_TH, scale_RH, body_index, outlier_index, minimum_RH)
    out_TH.copy_(_summed(packets, layout, scale_RH, body_index, outlier_index, minimum_RH))


def requantize(
    packets_RTB: Tensor | Sequence[Tensor],
    layout: PacketLayout,
    packet_TB: Tensor,
    gather_layout: PacketLayout,
    scale_RH: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum_RH: Tensor | None = None,
    *,
    gather_inverse_scale: Tensor | None = None,
    gather_body_index: Tensor | None = None,
    gather_outlier_index: Tensor | None = None,
    gather_minimum: Tensor | None = None,
) -> None:
    """Encode the sum of R packets again: `encode(decode_sum(packets_RTB))` into `packet_TB` (uint8 `[T, B]`).

    gather_layout: of `packet_TB`; it shares `features` with `layout` and may differ in everything else.
    gather_*: what encode needs for `gather_layout`.
    """
    packets = check_requantize(
        packets_RTB, layout, packet_TB, gather_layout, scale_RH, body_index, outlier_index, minimum_RH,
        gather_inverse_scale, gather_body_index, gather_outlier_index, gather_minimum,
    )  # fmt: skip
    sum_TH = _summed(packets, layout, scale_RH, body_index, outlier_index, minimum_RH)
    encode(
        sum_TH, gather_layout, packet_TB, gather_inverse_scale, gather_body_index, gather_outlier_index, gather_minimum
    )


def decode_add_norm(
    packet_TB: Tensor,
    layout: PacketLayout,
    residual_TH: Tensor,
    normed_TH: Tensor,
    weight_H: Tensor,
    eps: float,
    scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum: Tensor | None = None,
    bias_H: Tensor | None = None,
) -> None:
    """Add the values of a packet to the residual stream, and normalise it.

    residual_TH: fp32 `[T, H]`, becomes `residual + (decoded + bias)`, two fp32 additions, in place, bit for bit.
    normed_TH: fp32 or bf16 `[T, H]`, becomes `residual * rsqrt(mean(residual^2) + eps) * weight` in fp32. The mean is
        summed in an order of each backend's own: before the rounding to bf16, equal within 2e-6 relative.
    weight_H, bias_H: fp32 `[H]`.
    Raises TypeError for another dtype of `normed_TH`.
    """
    check_decode_add_norm(
        packet_TB, layout, residual_TH, normed_TH, weight_H, scale, body_index, outlier_index, minimum, bias_H
    )
    values_TH = _decoded(packet_TB, layout, scale, body_index, outlier_index, minimum)
    if bias_H is not None:
        values_TH = values_TH + bias_H
    residual_TH.copy_(one_nan(residual_TH + values_TH))
    normed_TH.copy_(torch.nn.functional.rms_norm(residual_TH, weight_H.shape, weight_H, eps))


def _summed(
    packets: list[Tensor],
    layout: PacketLayout,
    scale_RH: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
    minimum_RH: Tensor | None,
) -> Tensor:
    sum_TH: Tensor | None = None
    for rank, packet_TB in enumerate(packets):
        scale = None if scale_RH is None else scale_RH[rank]
        minimum = None if minimum_RH is None else minimum_RH[rank]
        values_TH = _decoded(packet_TB, layout, scale, body_index, outlier_index, minimum)
        sum_TH = values_TH if sum_TH is None else sum_TH + values_TH
    assert sum_TH is not None
    return one_nan(sum_TH)


def _decoded(
    packet_TB: Tensor,
    layout: PacketLayout,
    scale: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
    minimum: Tensor | None,
) -> Tensor:
    body = one_nan(_decoded_body(packet_TB, layout, scale, minimum))
    if body_index is None or outlier_index is None:
        return body
    values_TH = body.new_empty(packet_TB.shape[0], layout.features)
    values_TH[:, body_index] = body
    outlier_bits_TK = _read(packet_TB, layout.outliers_offset, layout.outliers, torch.int16)
    values_TH[:, outlier_index] = one_nan(bf16_values(outlier_bits_TK))
    return values_TH


def _decoded_body(packet_TB: Tensor, layout: PacketLayout, scale: Tensor | None, minimum: Tensor | None) -> Tensor:
    if layout.bits == 32:
        return _read(packet_TB, 0, layout.body, torch.float32)
    if layout.bits == 16:
        return bf16_values(_read(packet_TB, 0, layout.body, torch.int16))
    codes = unpack(packet_TB[:, : layout.codes_nbytes], layout.planes, layout.body)
    if not layout.group_size:
        assert scale is not None
        return decode_static(codes, layout, scale, minimum)
    sides = GroupSides(
        _read(packet_TB, layout.scales_offset, layout.groups, torch.int16 if layout.scale_nbytes == 2 else torch.uint8),
        _read(packet_TB, layout.row_scale_offset, 1, torch.int16) if layout.row_scale_nbytes else None,
        _read(packet_TB, layout.minimums_offset, layout.groups, torch.int16) if layout.asymmetric else None,
    )
    values = decode_groups(codes, layout, sides)
    return values if scale is None else values * scale


def _write(packet_TB: Tensor, offset: int, values: Tensor) -> None:
    """Put the bytes of `values` into a section of a packet. `view` refuses the strides of an empty section."""
    if values.numel():
        as_bytes = values.contiguous().view(torch.uint8)
        packet_TB[:, offset : offset + as_bytes.shape[1]] = as_bytes


def _read(packet_TB: Tensor, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` elements of `dtype` of each row. A copy, since a view may start at an unaligned address."""
    if count == 0 or packet_TB.shape[0] == 0:
        return packet_TB.new_empty((packet_TB.shape[0], count), dtype=dtype)
    section = packet_TB[:, offset : offset + count * dtype.itemsize]
    return section.clone(memory_format=torch.contiguous_format).view(dtype)
