"""Triton: what a group of values tells about its scale, the scale as it travels, and back.

Every function runs on the device. A group is judged by the largest of unsigned keys of its values: `group_key` and, for
asymmetric formats, `low_key`. Keys of masked values are 0, below all others. F is a `rows.Format`.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from lowbit_kernels.pack import (
    EXPONENT,
    MAGNITUDE,
    NAN_BF16_BITS,
    NAN_BITS,
    SIGN,
    as_bits,
    as_float,
    bf16_bits,
    small_float_code,
    small_float_value,
)
from lowbit_kernels.sections import Row

SCALE_FLOOR = tl.constexpr(2.0**-100)
SCALE_FLOOR_BITS = tl.constexpr(0x0D800000)
E8M0_FLOOR = tl.constexpr(27)
E8M0_LARGEST = tl.constexpr(254)
NAN_E4M3 = tl.constexpr(0x7F)
NAN_E8M0 = tl.constexpr(0xFF)
INVERSE_448 = tl.constexpr(float.fromhex("0x1.24924Ap-9"))  # fp32(1/448)


@triton.jit
def group_key(bits: tl.tensor, F: tl.constexpr) -> tl.tensor:
    """uint32 keys of fp32 bits.

    Asymmetric: in the order of the numbers. Signed peak: the magnitude, then the sign, so that a positive value wins a
    tie. Else the magnitude. In all of them NaN and infinity are beyond the finite values.
    """
    if F.asymmetric:
        key = bits ^ ((bits >> 31) | SIGN)
    elif F.signed_peak:
        key = (bits << 1) | (((bits >> 31) & 1) ^ 1)
    else:
        key = bits & MAGNITUDE
    return key.to(tl.uint32, bitcast=True)


@triton.jit
def low_key(key: tl.tensor) -> tl.tensor:
    """The keys (of asymmetric formats) the other way round: the largest one belongs to the smallest value."""
    return key ^ 0xFFFFFFFF


@triton.jit
def _bits_of_key(key: tl.tensor) -> tl.tensor:
    """fp32 bits of a key of an asymmetric format."""
    bits = key.to(tl.int32, bitcast=True)
    return bits ^ ((~bits >> 31) | SIGN)


@triton.jit
def group_minimum(low: tl.tensor) -> tl.tensor:
    """bf16 bits (int32) of the minimum of groups of these largest low keys. A zero is +0, whichever there was."""
    bits = bf16_bits(_bits_of_key(low ^ 0xFFFFFFFF))
    return tl.where((bits & 0x7FFF) == 0, 0, bits)


@triton.jit
def is_lost(key: tl.tensor, low: tl.tensor, F: tl.constexpr) -> tl.tensor:
    """True for groups that hold a value that is not finite, or whose minimum is beyond bf16."""
    if F.asymmetric:
        lost = (_bits_of_key(key) & MAGNITUDE) >= EXPONENT
        lost = lost | ((group_minimum(low) & 0x7FFF) >= 0x7F80)
    elif F.signed_peak:
        lost = (key >> 1).to(tl.int32, bitcast=True) >= EXPONENT
    else:
        lost = key.to(tl.int32, bitcast=True) >= EXPONENT
    return lost


@triton.jit
def wanted_step(key: tl.tensor, low: tl.tensor, F: tl.constexpr) -> tl.tensor:
    """The scale before it is rounded to bf16 or e4m3, fp32; anything for lost groups."""
    if F.asymmetric:
        minimum = as_float(group_minimum(low) << 16)
        wanted = tl.abs(as_float(_bits_of_key(key)) * F.step - minimum * F.step)
    elif F.signed_peak:
        bits = (key >> 1).to(tl.int32, bitcast=True) | (((key & 1) ^ 1) << 31).to(tl.int32, bitcast=True)
        wanted = as_float(bits) * F.step
    else:
        wanted = as_float(key.to(tl.int32, bitcast=True)) * F.step
    return wanted


@triton.jit
def row_scale_bits(largest: tl.tensor) -> tl.tensor:
    """bf16 bits (int32) of the row scale that e4m3 group scales need: `largest` wanted step of finite groups, fp32."""
    bits = bf16_bits(as_bits(largest * INVERSE_448))
    return tl.maximum(bits, SCALE_FLOOR_BITS >> 16)


@triton.jit
def encoded_scale(key: tl.tensor, low: tl.tensor, row_scale: tl.tensor, F: tl.constexpr) -> tl.tensor:
    """The scale of groups as it travels: bf16 bits or a byte, in an int32. NaN for lost groups.

    row_scale: fp32, for scales in e4m3.
    """
    if F.scales == "e8m0":
        if F.values == "int":
            step = as_bits(as_float(key.to(tl.int32, bitcast=True)) * F.step)
            exponent = (step >> 23) + ((step & 0x7FFFFF) != 0).to(tl.int32)
        else:
            exponent = (key >> 23).to(tl.int32, bitcast=True) - (8 if F.values == "e4m3" else 2)
        raw = tl.minimum(tl.maximum(exponent, E8M0_FLOOR), E8M0_LARGEST)
        raw = tl.where(is_lost(key, low, F), NAN_E8M0, raw)
    elif F.scales == "e4m3":
        raw = small_float_code(wanted_step(key, low, F) * tl.div_rn(1.0, row_scale), True)
        raw = tl.where((raw & 0x7F) == 0, 1, raw)
        raw = tl.where(is_lost(key, low, F), NAN_E4M3, raw)
    else:
        raw = bf16_bits(as_bits(wanted_step(key, low, F)))
        raw = tl.where((raw & 0x7FFF) < (SCALE_FLOOR_BITS >> 16), SCALE_FLOOR_BITS >> 16, raw)
        raw = tl.where(is_lost(key, low, F), NAN_BF16_BITS, raw)
    return raw


@triton.jit
def scale_value(raw: tl.tensor, row_scale: tl.tensor, F: tl.constexpr) -> tl.tensor:
    """fp32 scale of what travels (int32); `row_scale` (fp32) for scales in e4m3."""
    if F.scales == "e8m0":
        bits = tl.maximum(raw, E8M0_FLOOR) << 23
        value = as_float(tl.where(raw == NAN_E8M0, NAN_BITS, bits))
    elif F.scales == "e4m3":
        value = small_float_value(raw, True) * row_scale
    else:
        value = as_float(raw << 16)
    return value


@triton.jit
def load_scale(row: tl.tensor, group: tl.tensor, mask: tl.tensor, at: Row, F: tl.constexpr) -> tl.tensor:
    """The scales of groups of the packet row at `row` as they travel (int32); see `scale_value`."""
    section = row + at.scales
    if F.scales == "bf16":
        section = section.to(tl.pointer_type(tl.uint16))
    return tl.load(section + group, mask=mask, other=0).to(tl.int32)


@triton.jit
def store_scale(row: tl.tensor, group: tl.tensor, raw: tl.tensor, mask: tl.tensor, at: Row, F: tl.constexpr) -> None:
    """Write the scales of groups (int32) into the packet row at `row`."""
    section = row + at.scales
    if F.scales == "bf16":
        tl.store(section.to(tl.pointer_type(tl.int16)) + group, raw.to(tl.int16), mask=mask)
    else:
        tl.store(section + group, raw.to(tl.uint8), mask=mask)


@triton.jit
def load_row_scale(row: tl.tensor, mask: tl.tensor, at: Row) -> tl.tensor:
    """fp32 row scale of the packet row at `row`, a scalar."""
    bits = tl.load((row + at.row_scale).to(tl.pointer_type(tl.uint16)), mask=mask, other=0)
    return as_float(bits.to(tl.int32) << 16)


@triton.jit
def load_minimum(row: tl.tensor, group: tl.tensor, mask: tl.tensor, at: Row) -> tl.tensor:
    """fp32 minimums of groups of the packet row at `row`."""
    section = (row + at.minimums).to(tl.pointer_type(tl.uint16))
    return as_float(tl.load(section + group, mask=mask, other=0).to(tl.int32) << 16)


@triton.jit
def store_minimum(row: tl.tensor, group: tl.tensor, low: tl.tensor, lost: tl.tensor, mask: tl.tensor, at: Row) -> None:
    """Write the minimums of groups of these largest low keys; NaN for lost groups."""
    bits = tl.where(lost, NAN_BF16_BITS, group_minimum(low))
    tl.store((row + at.minimums).to(tl.pointer_type(tl.int16)) + group, bits.to(tl.int16), mask=mask)
