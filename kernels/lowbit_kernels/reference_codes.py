"""Body values to codes and group scales, and back, in eager torch. Part of `reference.py`.

Legend: T tokens, D = H - K body values of a row, G groups of a row, S values of a group.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_kernels.codebooks import levels, thresholds
from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.reference_floats import (
    E2M1,
    E4M3,
    E8M0_FLOOR,
    E8M0_LARGEST,
    NAN_BF16_BITS,
    NAN_E4M3,
    NAN_E8M0,
    SCALE_FLOOR,
    bf16_bits,
    bf16_values,
    e8m0_values,
    exponent_field,
    round_bf16,
)
from lowbit_kernels.reference_trellis import trellis_codes, trellis_places

MINUS_ZERO_E2M1 = 8


@dataclass(frozen=True)
class GroupSides:
    """What travels beside the codes of groups, as bits; None where a layout has no such section."""

    scale_TG: Tensor  # int16 bf16 bits, or uint8
    row_scale_T1: Tensor | None = None  # int16
    minimum_TG: Tensor | None = None  # int16


def fp32(x: float) -> float:
    """The fp32 number nearest to `x`."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def encode_static(body: Tensor, layout: PacketLayout, inverse_scale: Tensor, minimum: Tensor | None) -> Tensor:
    """Codes (int32 `[T, D]`) of values with static scales."""
    finite = torch.isfinite(body)
    if layout.values == "e4m3":
        return torch.where(finite, E4M3.codes(body * inverse_scale), NAN_E4M3)
    if layout.values == "e2m1":
        return torch.where(finite, _e2m1_codes(body * inverse_scale), MINUS_ZERO_E2M1)
    lowest, highest, lost = static_range(layout)
    if minimum is not None:
        body = body - minimum
    codes = torch.round(body * inverse_scale).clamp(lowest, highest)
    return torch.where(finite, codes, lost).to(torch.int32)


def decode_static(codes: Tensor, layout: PacketLayout, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """fp32 values of codes (int32 `[T, D]`, not negative) with static scales."""
    values = code_values(codes, layout) * scale
    if minimum is not None:
        values = values + minimum
    if layout.values == "e4m3":
        return values  # its NaN codes are NaN already
    lost = MINUS_ZERO_E2M1 if layout.values == "e2m1" else static_range(layout)[2]
    return torch.where(codes == lost & (2**layout.bits - 1), torch.nan, values)


def static_range(layout: PacketLayout) -> tuple[int, int, int]:
    """Lowest and highest integer code of a value with a static scale, and the code that means "not finite"."""
    if layout.asymmetric:
        return 0, 2**layout.bits - 2, 2**layout.bits - 1
    limit = 2 ** (layout.bits - 1) - 1
    return -limit, limit, -limit - 1


def encode_groups(body: Tensor, layout: PacketLayout) -> tuple[Tensor, GroupSides]:
    """Codes (int32 `[T, D]`) of values with a scale for each group, and these scales."""
    tokens, groups, size = body.shape[0], layout.groups, layout.group_size
    # The tail repeats its last value, which changes neither its largest magnitude nor its smallest value.
    padded = torch.cat((body, body[:, -1:].expand(-1, groups * size - layout.body)), dim=1)
    y_TGS = padded.view(tokens, groups, size)
    finite_TG = torch.isfinite(y_TGS).all(dim=2)
    minimum_TG = None
    if layout.asymmetric:
        minimum_TG = round_bf16(y_TGS.amin(dim=2)) + 0.0  # +0 where it is -0: which of them is the minimum is chance
        finite_TG = finite_TG & torch.isfinite(minimum_TG)  # near the largest fp32 value, bf16 overflows
        minimum_TG = torch.where(finite_TG, minimum_TG, 0.0)
    y_TGS = torch.where(finite_TG[:, :, None], y_TGS, 0.0)
    scale_TG, bits_TG, row_bits_T1 = _scales(y_TGS, minimum_TG, layout)
    inverse_TG1 = torch.reciprocal(scale_TG).unsqueeze(2)
    if minimum_TG is not None:
        y_TGS = y_TGS - minimum_TG[:, :, None]
    product = y_TGS * inverse_TG1
    if layout.values == "e4m3":
        codes = E4M3.codes(product)
    elif layout.values == "e2m1":
        codes = _e2m1_codes(product)
    elif layout.has_trellis:
        codes = _trellis_codes(product, layout)
    elif layout.has_levels:
        # how many thresholds a product exceeds
        codes = torch.bucketize(product, product.new_tensor(thresholds(layout.values, layout.bits)), out_int32=True)
    else:
        codes = torch.round(product).clamp(*group_range(layout)).to(torch.int32)
    codes = torch.where(finite_TG[:, :, None], codes, 0).view(tokens, groups * size)[:, : layout.body]
    nan = {"bf16": NAN_BF16_BITS, "e4m3": NAN_E4M3, "e8m0": NAN_E8M0}[layout.scale_format]
    bits_TG = torch.where(finite_TG, bits_TG, nan).to(torch.int16 if layout.scale_format == "bf16" else torch.uint8)
    if minimum_TG is None:
        return codes, GroupSides(bits_TG, row_bits_T1)
    minimum_bits_TG = torch.where(finite_TG, bf16_bits(minimum_TG), NAN_BF16_BITS).to(torch.int16)
    return codes, GroupSides(bits_TG, row_bits_T1, minimum_bits_TG)


def decode_groups(codes: Tensor, layout: PacketLayout, sides: GroupSides) -> Tensor:
    """fp32 values of codes (int32 `[T, D]`, not negative) with a scale for each group."""
    if layout.scale_format == "e8m0":
        scale_TG = e8m0_values(sides.scale_TG.to(torch.int32))
    elif layout.scale_format == "e4m3":
        assert sides.row_scale_T1 is not None
        scale_TG = E4M3.values(sides.scale_TG.to(torch.int32)) * bf16_values(sides.row_scale_T1)
    else:
        scale_TG = bf16_values(sides.scale_TG)

    def of_each_value(group_TG: Tensor) -> Tensor:
        return group_TG.repeat_interleave(layout.group_size, dim=1)[:, : layout.body]

    values = code_values(codes, layout) * of_each_value(scale_TG)
    if sides.minimum_TG is not None:
        values = values + of_each_value(bf16_values(sides.minimum_TG))
    return values


def group_range(layout: PacketLayout) -> tuple[int, int]:
    """Lowest and highest integer code of a value in a group.

    Symmetric codes of 8 bits, or with a power of two as scale, leave the lowest code of two's complement alone.
    """
    if layout.asymmetric:
        return 0, 2**layout.bits - 1
    limit = 2 ** (layout.bits - 1) - 1
    return (-limit if layout.bits == 8 or layout.scale_format == "e8m0" else -limit - 1), limit


def code_values(codes: Tensor, layout: PacketLayout) -> Tensor:
    """What codes (int32, not negative) stand for before any scale, fp32."""
    if layout.values == "e4m3":
        return E4M3.values(codes)
    if layout.values == "e2m1":
        return E2M1.values(codes)
    if layout.has_trellis:
        codes = trellis_places(codes, layout.group_size)
    if layout.has_levels:
        return torch.tensor(levels(layout.values, layout.bits), device=codes.device)[codes]
    if layout.asymmetric:
        return codes.float()
    sign = 2 ** (layout.bits - 1)
    return ((codes ^ sign) - sign).float()


def _trellis_codes(product_TGS: Tensor, layout: PacketLayout) -> Tensor:
    """The last group of a row ends where the body does."""
    tokens, groups, size = product_TGS.shape
    book = levels(layout.values, layout.bits)
    codes = trellis_codes(product_TGS.reshape(tokens * groups, size), book).view(tokens, groups, size)
    if rest := layout.body % size:
        codes[:, -1, :rest] = trellis_codes(product_TGS[:, -1, :rest], book)
    return codes


def _scales(y_TGS: Tensor, minimum_TG: Tensor | None, layout: PacketLayout) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scales of groups that are all finite: their effective values (fp32), their bits, the bits of the row scale."""
    if layout.scale_format == "e8m0":
        bits_TG = _e8m0_bytes(y_TGS.abs().amax(dim=2), layout)
        return e8m0_values(bits_TG), bits_TG, None
    wanted_TG = _wanted_step(y_TGS, minimum_TG, layout)
    if layout.scale_format == "bf16":
        scale_TG = _raised(round_bf16(wanted_TG))
        return scale_TG, bf16_bits(scale_TG), None
    # a group that is not finite is all 0 here, so it does not decide the largest step
    none_TG = wanted_TG.new_zeros(wanted_TG.shape[0], 1)
    largest_T1 = torch.cat((wanted_TG.abs(), none_TG), dim=1).amax(dim=1, keepdim=True)
    row_scale_T1 = _raised(round_bf16(largest_T1 * fp32(1 / 448)))
    bits_TG = E4M3.codes(wanted_TG * torch.reciprocal(row_scale_T1))
    bits_TG = torch.where(bits_TG & 0x7F == 0, 1, bits_TG)  # 2^-9, the smallest there is
    return E4M3.values(bits_TG) * row_scale_T1, bits_TG, bf16_bits(row_scale_T1)


def _wanted_step(y_TGS: Tensor, minimum_TG: Tensor | None, layout: PacketLayout) -> Tensor:
    """The scale before it is rounded to its format, fp32 `[T, G]`.

    Symmetric integers of up to 7 bits, and "lm": the value of largest magnitude, positive on a tie, becomes the lowest
    code, so that all codes are in use and the scale may be negative. Else the largest magnitude becomes the largest
    code. It cannot overflow. Rounded to bf16 it can with levels, whose largest is 1: then the scale is infinite, and so
    is what the group decodes to, but for NaN where the level is 0.
    """
    highest_TG, lowest_TG = y_TGS.amax(dim=2), y_TGS.amin(dim=2)
    if layout.values in ("lm", "tc"):
        return -torch.where(highest_TG >= -lowest_TG, highest_TG, lowest_TG)
    if layout.values == "nf4":
        return torch.maximum(highest_TG, -lowest_TG)
    if layout.values != "int":
        return y_TGS.abs().amax(dim=2) * fp32(1 / (448 if layout.values == "e4m3" else 6))
    if minimum_TG is not None:
        share = fp32(1 / (2**layout.bits - 1))
        return (highest_TG * share - minimum_TG * share).abs()  # a minimum that rounds up may exceed all values
    if layout.bits == 8:
        return y_TGS.abs().amax(dim=2) * fp32(1 / 127)
    return torch.where(highest_TG >= -lowest_TG, highest_TG, lowest_TG) * -(0.5 ** (layout.bits - 1))


def _e8m0_bytes(largest_TG: Tensor, layout: PacketLayout) -> Tensor:
    """Biased exponent (int32) of the power of two that is the scale of groups of this largest magnitude.

    Integers: none is clamped, so it is the next one at or above the largest magnitude over the largest code. Floats, as
    OCP MX has it: the exponent of the largest magnitude becomes that of the largest value, which may then saturate.
    """
    if layout.values == "int":
        step_TG = largest_TG * fp32(1 / (2 ** (layout.bits - 1) - 1))
        has_mantissa = step_TG.view(torch.int32) & 0x7FFFFF != 0
        exponent = exponent_field(step_TG) + has_mantissa.to(torch.int32)
    else:
        exponent = exponent_field(largest_TG) - (8 if layout.values == "e4m3" else 2)
    return exponent.clamp(E8M0_FLOOR, E8M0_LARGEST)


def _raised(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < SCALE_FLOOR, SCALE_FLOOR, scale)


def _e2m1_codes(x: Tensor) -> Tensor:
    """Codes of e2m1 without minus zero."""
    codes = E2M1.codes(x)
    return torch.where(codes == MINUS_ZERO_E2M1, 0, codes)
