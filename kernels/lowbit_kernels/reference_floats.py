"""Small floating-point formats to bits and back, and codes to planes, in eager torch. Part of `reference.py`.

All roundings are to nearest, ties to even, done on bits or by exact arithmetic, so that no cast of a library has a say:
torch's cast to bf16 gives NaN bits that vary with its length, and its FP8 types are missing on some devices.

Legend: T tokens, N values or bytes of a row, W bits of a plane.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NAN_BF16_BITS = 0x7FC0
NAN_E4M3 = 0x7F
NAN_E8M0 = 0xFF
# Scales below it are raised to it, so that 1/scale is finite and denormals encode to 0 whether or not they are flushed.
SCALE_FLOOR = 2.0**-100
E8M0_FLOOR = 27  # the byte of 2^-100
E8M0_LARGEST = 254


@dataclass(frozen=True)
class SmallFloat:
    """A format of `bits` bits: the sign, the exponent (1 stands for `lowest_exponent`, 0 for denormals), the mantissa.

    Every code is a finite value but for e4m3's two NaNs, which are where a larger value would be.
    """

    bits: int
    mantissa_bits: int
    lowest_exponent: int
    largest: float

    def codes(self, x: Tensor) -> Tensor:
        """Codes (int32) of fp32 values, nearest even, saturating, -0 for negative values that round to 0.

        NaN gives an arbitrary code, for the caller to replace.
        """
        magnitude = torch.where(torch.isnan(x), 0.0, x.abs()).clamp_max(self.largest).contiguous()
        exponent = (exponent_field(magnitude) - 127).clamp_min(self.lowest_exponent)
        # In units of the last mantissa bit, which a rounding up to the next power of two carries into the exponent.
        units = torch.round(magnitude * power_of_two(self.mantissa_bits - exponent)).to(torch.int32)
        codes = ((exponent - self.lowest_exponent) << self.mantissa_bits) + units
        return codes | (torch.signbit(x).to(torch.int32) << (self.bits - 1))

    def values(self, codes: Tensor) -> Tensor:
        """fp32 values of codes (int32, the sign bit the highest), exactly."""
        magnitude = codes & (2 ** (self.bits - 1) - 1)
        exponent, mantissa = magnitude >> self.mantissa_bits, magnitude & (2**self.mantissa_bits - 1)
        significand = torch.where(exponent == 0, mantissa, mantissa + 2**self.mantissa_bits)
        unit = power_of_two(exponent.clamp_min(1) - 1 + self.lowest_exponent - self.mantissa_bits)
        values = significand.float() * unit
        values = torch.where(codes >> (self.bits - 1) == 0, values, -values)
        return torch.where(magnitude == NAN_E4M3, torch.nan, values) if self.bits == 8 else values


E4M3 = SmallFloat(bits=8, mantissa_bits=3, lowest_exponent=-6, largest=448.0)
E2M1 = SmallFloat(bits=4, mantissa_bits=1, lowest_exponent=0, largest=6.0)


def exponent_field(x: Tensor) -> Tensor:
    """Biased exponent (int32, 0 to 255) of fp32 values that are not negative."""
    return x.contiguous().view(torch.int32) >> 23


def power_of_two(exponent: Tensor) -> Tensor:
    """fp32 2^exponent for int32 exponents of -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)


def e8m0_values(scale_bytes: Tensor) -> Tensor:
    """fp32 values of e8m0 bytes (int32): 2^(byte - 127), bytes below 27 read as 27, 255 as NaN."""
    return torch.where(scale_bytes == NAN_E8M0, torch.nan, power_of_two(scale_bytes.clamp(E8M0_FLOOR, 254) - 127))


def bf16_bits(x: Tensor) -> Tensor:
    """fp32 to bf16 bits (int16), nearest even, every NaN as 0x7FC0; beyond the largest bf16 Inf."""
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.where(torch.isnan(x), NAN_BF16_BITS, rounded).to(torch.int16)


def bf16_values(bits: Tensor) -> Tensor:
    """bf16 bits (int16) to fp32, by shifting: exact, denormals included."""
    return (bits.to(torch.int32) << 16).view(torch.float32)


def round_bf16(x: Tensor) -> Tensor:
    """fp32 values rounded to bf16."""
    return bf16_values(bf16_bits(x))


def one_nan(values: Tensor) -> Tensor:
    """The same values with one bit pattern for NaN."""
    return torch.where(torch.isnan(values), torch.nan, values)


def pack(codes: Tensor, planes: tuple[int, ...]) -> Tensor:
    """Codes (int32 `[T, N]`, the bits above those of the planes ignored) to bytes: the planes one after another."""
    sections, shift = [], 0
    for width in planes:
        parts = (codes >> shift) & (2**width - 1)
        in_byte = 8 // width
        parts = torch.nn.functional.pad(parts, (0, -parts.shape[1] % in_byte)).unflatten(1, (-1, in_byte))
        places = torch.arange(0, 8, width, dtype=torch.int32, device=codes.device)
        sections.append((parts << places).sum(dim=2).to(torch.uint8))
        shift += width
    return torch.cat(sections, dim=1)


def unpack(section: Tensor, planes: tuple[int, ...], count: int) -> Tensor:
    """The planes of `count` codes (uint8 `[T, bytes]`) to codes (int32 `[T, count]`, not negative)."""
    codes = torch.zeros(section.shape[0], count, dtype=torch.int32, device=section.device)
    start, shift = 0, 0
    for width in planes:
        nbytes = -(-count * width // 8)
        places = torch.arange(0, 8, width, dtype=torch.int32, device=section.device)
        parts = (section[:, start : start + nbytes, None].to(torch.int32) >> places) & (2**width - 1)
        codes |= parts.flatten(1)[:, :count] << shift
        start, shift = start + nbytes, shift + width
    return codes
