"""Triton: from fp32 bits to codes, scales and bf16, and back. The steps that the kernels share.

Floats travel as their int32 bits wherever they are not multiplied or added, so that NaN payloads and denormals cannot
be touched by a conversion. Every function here runs on the device; `x` and `bits` are blocks or scalars.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels.layout import PacketLayout

ROUND_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds half to even
ROUNDED_ZERO = tl.constexpr(0x4B400000)  # its bits
EXPONENT = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
SIGN = tl.constexpr(-0x80000000)
NAN_BITS = tl.constexpr(0x7FC00000)
NAN_BF16_BITS = tl.constexpr(0x7FC0)
SCALE_FLOOR_BF16_BITS = tl.constexpr(0x0D80)  # 2^-100
INVERSE_127_BITS = tl.constexpr(0x3C010204)  # 1/127 rounded to fp32


def check_alignment(packet_TB: Tensor, layout: PacketLayout) -> None:
    """Raise ValueError where scales and outliers (16 bits) or values (32 bits) could not be loaded whole."""
    needed = 4 if layout.bits == 32 else 2
    if packet_TB.data_ptr() % needed or packet_TB.stride(0) % needed:
        raise ValueError(
            f"packet rows start at address {packet_TB.data_ptr()} with {packet_TB.stride(0)} bytes between them; "
            f"the Triton codec needs multiples of {needed}, as rows of a fresh uint8 tensor have"
        )


@triton.jit
def load_bits(pointer: tl.tensor, mask: tl.tensor, IS_BF16: tl.constexpr) -> tl.tensor:
    """fp32 bits (int32) of values stored as fp32 (pointer to int32) or bf16 (pointer to int16); 0.0 where masked."""
    bits = tl.load(pointer, mask=mask, other=0).to(tl.int32)
    if IS_BF16:
        bits = bits << 16
    return bits


@triton.jit
def bf16_bits(bits: tl.tensor) -> tl.tensor:
    """fp32 bits to bf16 bits (in an int32), nearest even, NaN as 0x7FC0."""
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & MAGNITUDE) > EXPONENT, NAN_BF16_BITS, rounded)


@triton.jit
def one_nan(bits: tl.tensor) -> tl.tensor:
    """fp32 bits with every NaN as 0x7FC00000."""
    return tl.where((bits & MAGNITUDE) > EXPONENT, NAN_BITS, bits)


@triton.jit
def code_of(product: tl.tensor, LOWEST: tl.constexpr, HIGHEST: tl.constexpr) -> tl.tensor:
    """clamp(round_half_even(product)) as int32.

    Clamping to integers first gives the same, keeps the addition exact, and parts it from the multiplication before it,
    so that they cannot be fused. A NaN gives an arbitrary code, for the caller to replace.
    """
    clamped = tl.where(product > HIGHEST, HIGHEST * 1.0, product)
    clamped = tl.where(clamped < LOWEST, LOWEST * 1.0, clamped)
    return (clamped + ROUND_TO_INTEGER).to(tl.int32, bitcast=True) - ROUNDED_ZERO


@triton.jit
def group_scale(
    low: tl.tensor, high: tl.tensor, low_in: tl.tensor, high_in: tl.tensor, BITS: tl.constexpr
) -> tl.tensor:
    """bf16 bits of the scale of a group: the values (fp32 bits) of `low` and `high` where `low_in` and `high_in`.

    Magnitudes order as their bits do. A value of the other sign is a negative integer, and never the maximum.
    """
    low = tl.where(low_in, low, 0)
    high = tl.where(high_in, high, 0)
    if BITS == 4:
        positive = tl.maximum(tl.maximum(tl.max(low, 0), tl.max(high, 0)), 0)
        negative = tl.maximum(tl.max(tl.where(low_in, low ^ SIGN, 0), 0), tl.max(tl.where(high_in, high ^ SIGN, 0), 0))
        negative = tl.maximum(negative, 0)
        highest = tl.maximum(positive, negative)
        peak = tl.where(positive >= negative, positive, negative | SIGN)
        exact = peak.to(tl.float32, bitcast=True) * -0.125
    else:
        highest = tl.maximum(tl.max(low & MAGNITUDE, 0), tl.max(high & MAGNITUDE, 0))
        exact = highest.to(tl.float32, bitcast=True) * tl.full((), INVERSE_127_BITS, tl.int32).to(
            tl.float32, bitcast=True
        )
    scale = bf16_bits(exact.to(tl.int32, bitcast=True))
    scale = tl.where((scale & 0x7FFF) < SCALE_FLOOR_BF16_BITS, SCALE_FLOOR_BF16_BITS, scale)
    return tl.where(highest >= EXPONENT, NAN_BF16_BITS, scale)


@triton.jit
def store_codes(
    row: tl.tensor,
    pair: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    low_in: tl.tensor,
    high_in: tl.tensor,
    BITS: tl.constexpr,
) -> None:
    """Write the codes of values `2 * pair` and `2 * pair + 1` of the body, where in, into the packet row at `row`."""
    if BITS == 4:
        high = tl.where(high_in, high, 0)  # the nibble behind an odd tail
        tl.store(row + pair, ((low & 0xF) | ((high & 0xF) << 4)).to(tl.uint8), mask=low_in)
    else:
        tl.store(row + 2 * pair, (low & 0xFF).to(tl.uint8), mask=low_in)
        tl.store(row + 2 * pair + 1, (high & 0xFF).to(tl.uint8), mask=high_in)


@triton.jit
def load_code(row: tl.tensor, value: tl.tensor, mask: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """The code (int32) of value number `value` of the body, from the packet row at `row`."""
    if BITS == 4:
        byte = tl.load(row + value // 2, mask=mask, other=0).to(tl.int32)
        code = (((byte >> ((value & 1) * 4)) & 0xF) ^ 8) - 8
    else:
        byte = tl.load(row + value, mask=mask, other=0).to(tl.int32)
        code = (byte ^ 0x80) - 0x80
    return code


@triton.jit
def load_bf16(row: tl.tensor, offset: tl.tensor, index: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """fp32 bits of bf16 value number `index` of the section `offset` bytes (an even number) into the packet row."""
    pointer = (row + offset).to(tl.pointer_type(tl.int16))
    return tl.load(pointer + index, mask=mask, other=0).to(tl.int32) << 16
