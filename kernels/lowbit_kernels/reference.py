"""The codec in eager torch: the definition that every other backend must match bit for bit, on CPU and on CUDA.

Arguments that all three functions share:
    layout: what a row of the packet looks like.
    body_index, outlier_index: int64 `[H-K]` and `[K]`, ascending, together every feature once; None where K is 0.

No order of evaluation can change a bit: scales are representable in bf16, so `code * scale` (8 x 8 significant bits)
is exact in fp32, and a fused multiply-add gives the same sum unless the product overflows (the compiled backends forbid
fusion for that); sums run in rank order. Every NaN that comes out has the bits 0x7FC00000 (0x7FC0 as bf16), for
hardware disagrees about NaN bits. Hosts are little endian.

Not for speed: it makes many temporaries. Source of the static format: arXiv 2411.07942, section 3.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a row; G groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_kernels.checks import check_decode, check_decode_sum, check_encode
from lowbit_kernels.layout import PacketLayout

name = "torch"

NAN_BF16_BITS = 0x7FC0
# Scales below it are raised to it, so that 1/scale is finite and denormals encode to 0 whether or not they are flushed.
SCALE_FLOOR = 2.0**-100
INVERSE_127 = float.fromhex("0x1.020408p-7")  # 1/127 rounded to fp32


def encode(
    x_TH: Tensor,
    layout: PacketLayout,
    packet_TB: Tensor,
    inverse_scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
) -> None:
    """Write `x_TH` (fp32 or bf16 `[T, H]`) into `packet_TB` (uint8 `[T, B]`, owned by the caller), padding included.

    inverse_scale: fp32 `[H-K]` in body order, finite and above 0; given exactly where `layout.static_scales`.

    Static scales: code = clamp(round_half_even(x * inverse_scale), -7, 7), or -8 where x is not finite (8 bits: 127
    and -128). Group scales: see `_group_scales`; a group with a non-finite value has the scale NaN and codes 0.
    bf16 values round to nearest even, so a finite value beyond the range of bf16 becomes Inf.
    Raises TypeError for another dtype of x, ValueError for shapes that do not fit.
    """
    check_encode(x_TH, layout, packet_TB, inverse_scale, body_index, outlier_index)
    x_TH = x_TH.float()
    body = x_TH if body_index is None else x_TH.index_select(1, body_index)
    packet_TB.zero_()
    if layout.bits == 32:
        bits = torch.where(torch.isnan(body), NAN_BF16_BITS << 16, body.contiguous().view(torch.int32))
        _write(packet_TB[:, : layout.codes_nbytes], bits)
    elif layout.bits == 16:
        _write(packet_TB[:, : layout.codes_nbytes], _bf16_bits(body))
    elif layout.group_size:
        scale_bits_TG, codes = _encode_groups(body, layout)
        _write(packet_TB[:, layout.scales_offset : layout.outliers_offset], scale_bits_TG)
        _write(packet_TB[:, : layout.codes_nbytes], _pack(codes, layout.bits))
    else:
        assert inverse_scale is not None
        limit = 2 ** (layout.bits - 1) - 1
        codes = torch.round(body * inverse_scale).clamp(-limit, limit)
        codes = torch.where(torch.isfinite(body), codes, -limit - 1).to(torch.int8)
        _write(packet_TB[:, : layout.codes_nbytes], _pack(codes, layout.bits))
    if outlier_index is not None:
        outliers_end = layout.outliers_offset + 2 * layout.outliers
        bits_TK = _bf16_bits(x_TH.index_select(1, outlier_index))
        _write(packet_TB[:, layout.outliers_offset : outliers_end], bits_TK)


def decode(
    packet_TB: Tensor,
    layout: PacketLayout,
    out_TH: Tensor,
    scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
) -> None:
    """Write the values of `packet_TB` (uint8 `[T, B]`) into `out_TH` (fp32 `[T, H]`, owned by the caller).

    scale: fp32 `[H-K]` in body order, representable in bf16; given exactly where `layout.static_scales`.
    Raises ValueError for shapes that do not fit.
    """
    check_decode(packet_TB, layout, out_TH, scale, body_index, outlier_index)
    out_TH.copy_(_decoded(packet_TB, layout, scale, body_index, outlier_index))


def decode_sum(
    packets_RTB: Tensor | Sequence[Tensor],
    layout: PacketLayout,
    out_TH: Tensor,
    scale_RH: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
) -> None:
    """Write the sum of R packets, `((d0 + d1) + d2) + ...` in fp32 in this order, into `out_TH` (fp32 `[T, H]`).

    packets_RTB: a tensor `[R, T, B]`, or R tensors `[T, B]`.
    scale_RH: fp32 `[R, H-K]`, each sender's scales in body order; given exactly where `layout.static_scales`.
    Raises ValueError for shapes that do not fit.
    """
    packets = check_decode_sum(packets_RTB, layout, out_TH, scale_RH, body_index, outlier_index)
    scales = [None] * len(packets) if scale_RH is None else list(scale_RH.unbind(0))
    sum_TH = _decoded(packets[0], layout, scales[0], body_index, outlier_index)
    for packet_TB, scale in zip(packets[1:], scales[1:], strict=True):
        sum_TH += _decoded(packet_TB, layout, scale, body_index, outlier_index)
    out_TH.copy_(_one_nan(sum_TH))


def _decoded(
    packet_TB: Tensor,
    layout: PacketLayout,
    scale: Tensor | None,
    body_index: Tensor | None,
    outlier_index: Tensor | None,
) -> Tensor:
    tokens = packet_TB.shape[0]
    codes_bytes = packet_TB[:, : layout.codes_nbytes]
    if layout.bits == 32:
        return _one_nan(_reread(codes_bytes, torch.float32))
    if layout.bits == 16:
        return _one_nan(_bf16_values(_reread(codes_bytes, torch.int16)))
    codes = _unpack(codes_bytes, layout.bits)[:, : layout.body]
    if layout.group_size:
        scale_bits_TG = _reread(packet_TB[:, layout.scales_offset : layout.outliers_offset], torch.int16)
        scales = _bf16_values(scale_bits_TG).repeat_interleave(layout.group_size, dim=1)[:, : layout.body]
        body = codes.float() * scales
    else:
        assert scale is not None
        not_finite = codes == -(2 ** (layout.bits - 1))
        body = torch.where(not_finite, torch.nan, codes.float() * scale)
    if body_index is None or outlier_index is None:
        return _one_nan(body)
    values_TH = torch.empty(tokens, layout.features, dtype=torch.float32, device=packet_TB.device)
    outliers_end = layout.outliers_offset + 2 * layout.outliers
    outlier_bits_TK = _reread(packet_TB[:, layout.outliers_offset : outliers_end], torch.int16)
    values_TH[:, body_index] = body
    values_TH[:, outlier_index] = _bf16_values(outlier_bits_TK)
    return _one_nan(values_TH)


def _encode_groups(body: Tensor, layout: PacketLayout) -> tuple[Tensor, Tensor]:
    """Return the bits of the scales (int16 `[T, G]`) and the codes (int8 `[T, H-K]`)."""
    tokens, groups, size = body.shape[0], layout.groups, layout.group_size
    # Zeros behind the tail leave its scale as it is: the largest magnitude stays the largest.
    padded = torch.nn.functional.pad(body, (0, groups * size - layout.body)).view(tokens, groups, size)
    if groups == 0:
        return padded.new_empty(tokens, 0, dtype=torch.int16), padded.new_empty(tokens, 0, dtype=torch.int8)
    finite_TG1 = torch.isfinite(padded).all(dim=2, keepdim=True)
    scale_TG1 = _group_scales(padded, layout.bits)
    lowest, highest = (-8, 7) if layout.bits == 4 else (-127, 127)
    codes = torch.round(padded * torch.reciprocal(scale_TG1)).clamp(lowest, highest)
    codes = torch.where(finite_TG1, codes, 0).to(torch.int8).view(tokens, groups * size)[:, : layout.body]
    return torch.where(finite_TG1, _bf16_bits(scale_TG1), NAN_BF16_BITS).squeeze(2).to(torch.int16), codes


def _group_scales(values: Tensor, bits: int) -> Tensor:
    """Scale of each finite group `values[t, g, :]`, fp32 `[T, G, 1]`, representable in bf16.

    4 bits: the value of largest magnitude, positive on a tie, becomes code -8, so that all 16 codes are in use: the
    scale is that value times -1/8 and may be negative. 8 bits: the largest magnitude becomes 127.
    Neither can overflow: the scale is at most an eighth of the largest finite value.
    """
    if bits == 4:
        amax, amin = values.amax(dim=2, keepdim=True), values.amin(dim=2, keepdim=True)
        exact = torch.where(amax >= -amin, amax, amin) * -0.125
    else:
        exact = values.abs().amax(dim=2, keepdim=True) * INVERSE_127
    scale = _bf16_values(_bf16_bits(exact))
    return torch.where(scale.abs() < SCALE_FLOOR, SCALE_FLOOR, scale)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (int8 `[T, N]`) to bytes (uint8 `[T, ceil(N * bits / 8)]`); the nibble behind an odd tail is 0."""
    as_bytes = codes.contiguous().view(torch.uint8)
    if bits == 8:
        return as_bytes
    nibbles = torch.nn.functional.pad(as_bytes & 0xF, (0, codes.shape[1] % 2))
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def _unpack(as_bytes: Tensor, bits: int) -> Tensor:
    """Bytes (uint8 `[T, N]`) to codes (int8; `[T, 2 * N]` for 4 bits)."""
    if bits == 8:
        return _reread(as_bytes, torch.int8)
    nibbles = torch.stack((as_bytes & 0xF, as_bytes >> 4), dim=2).flatten(1).view(torch.int8)
    return (nibbles ^ 8) - 8


def _bf16_bits(x: Tensor) -> Tensor:
    """fp32 to bf16 bits (int16), nearest even. Explicit: torch's cast gives NaN bits that vary with its length."""
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.where(torch.isnan(x), NAN_BF16_BITS, rounded).to(torch.int16)


def _bf16_values(bits: Tensor) -> Tensor:
    """bf16 bits (int16) to fp32, by shifting: exact, denormals included."""
    return (bits.to(torch.int32) << 16).view(torch.float32)


def _one_nan(values: Tensor) -> Tensor:
    return torch.where(torch.isnan(values), torch.nan, values)


def _write(section: Tensor, values: Tensor) -> None:
    """Put the bytes of `values` into a section of a packet. `view` refuses the strides of an empty section."""
    if section.numel():
        section.copy_(values.contiguous().view(torch.uint8))


def _reread(as_bytes: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of each row as elements of `dtype`. A copy, since a view may start at an unaligned address."""
    if as_bytes.shape[1] == 0:
        return as_bytes.new_empty(as_bytes.shape, dtype=dtype)
    return as_bytes.clone(memory_format=torch.contiguous_format).view(dtype)
