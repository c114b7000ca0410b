"""Triton: fp32 to bf16, to codes and back, on bits. What the kernels share; every function runs on the device.

Floats travel as their int32 bits wherever they are not multiplied or added, so that NaN payloads and denormals cannot
be touched by a conversion. `x` is a block (or scalar) of fp32, `bits` one of int32 that holds fp32 bits.

Nothing here may be fused or flushed: launch what uses it with `enable_fp_fusion=False`.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

ROUND_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds half to even
ROUNDED_ZERO = tl.constexpr(0x4B400000)  # its bits
EXPONENT = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
SIGN = tl.constexpr(-0x80000000)
NAN_BITS = tl.constexpr(0x7FC00000)
NAN_BF16_BITS = tl.constexpr(0x7FC0)


@triton.jit
def as_float(bits: tl.tensor) -> tl.tensor:
    """The fp32 numbers of these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def as_bits(x: tl.tensor) -> tl.tensor:
    """The bits of these fp32 numbers."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def load_bits(pointer: tl.tensor, mask: tl.tensor, IS_BF16: tl.constexpr) -> tl.tensor:
    """fp32 bits (int32) of values stored as fp32 (pointer to int32) or bf16 (pointer to int16); any where masked."""
    bits = tl.load(pointer, mask=mask, eviction_policy="evict_first").to(tl.int32)
    if IS_BF16:
        bits = bits << 16
    return bits


@triton.jit
def bf16_bits(bits: tl.tensor) -> tl.tensor:
    """fp32 bits to bf16 bits (in an int32), nearest even, NaN as 0x7FC0."""
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & MAGNITUDE) > EXPONENT, NAN_BF16_BITS, rounded)


@triton.jit
def one_nan(x: tl.tensor) -> tl.tensor:
    """Bits of fp32 numbers, with every NaN as 0x7FC00000."""
    return tl.where(x != x, NAN_BITS, as_bits(x))


@triton.jit
def is_finite(x: tl.tensor) -> tl.tensor:
    """True where fp32 numbers are neither NaN nor infinite."""
    return tl.abs(x) < float("inf")


@triton.jit
def rounded_code(product: tl.tensor, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, BIAS: tl.constexpr) -> tl.tensor:
    """clamp(round_half_even(product)) + BIAS + ROUNDED_ZERO, an int32.

    Clamping to integers first gives the same, keeps the addition exact, and parts it from the multiplication before it,
    so that they cannot be fused. BIAS is even, or ties would round to odd. A NaN gives an arbitrary code.
    """
    clamped = tl.minimum(tl.maximum(product, LOWEST * 1.0), HIGHEST * 1.0)
    return as_bits(clamped + (ROUND_TO_INTEGER + BIAS))


@triton.jit
def small_float_code(x: tl.tensor, E4M3: tl.constexpr) -> tl.tensor:
    """e4m3 or e2m1 codes (int32) of fp32 numbers, nearest even, saturating. A NaN gives an arbitrary code.

    Adding 2^23 units of the last place of the result rounds to it. What is left above is the mantissa in these units,
    which carries into the exponent by itself. e2m1 has no minus zero here: that code means "not finite".
    """
    MANTISSA_BITS: tl.constexpr = 3 if E4M3 else 1
    SMALLEST_EXPONENT: tl.constexpr = (127 - 6 if E4M3 else 127) << 23
    LARGEST: tl.constexpr = 448.0 if E4M3 else 6.0
    bits = as_bits(x)
    magnitude = tl.minimum(as_float(bits & MAGNITUDE), LARGEST)
    exponent = tl.maximum(as_bits(magnitude) & EXPONENT, SMALLEST_EXPONENT)
    unit = exponent + ((23 - MANTISSA_BITS) << 23)
    code = as_bits(magnitude + as_float(unit)) - unit + ((exponent - SMALLEST_EXPONENT) >> (23 - MANTISSA_BITS))
    return code | ((bits >> 24) & 0x80) if E4M3 else tl.where(code == 0, 0, code | ((bits >> 28) & 8))


@triton.jit
def level_code(x: tl.tensor, F: tl.constexpr) -> tl.tensor:
    """Codes (int32) of levels: how many thresholds of the code book of F fp32 numbers exceed."""
    code = (x > F.thresholds[0]).to(tl.int32)
    for k in tl.static_range(1, 2**F.bits - 1):
        code += (x > F.thresholds[k]).to(tl.int32)
    return code


@triton.jit
def level_value(code: tl.tensor, F: tl.constexpr) -> tl.tensor:
    """fp32 levels of codes (int32, not negative) in the code book of F: first a pair of them, to halve the choices.

    Of a trellis: of what `singles.trellis_place` makes of codes.
    """
    PAIRS: tl.constexpr = 2**F.bits if F.has_trellis else 2 ** (F.bits - 1)
    bits = tl.full(code.shape, F.level_pairs[0], tl.int32)
    for pair in tl.static_range(1, PAIRS):
        bits = tl.where((code >> 1) == pair, F.level_pairs[pair], bits)
    return as_float(tl.where((code & 1) == 1, bits & -0x10000, bits << 16))


@triton.jit
def small_float_value(code: tl.tensor, E4M3: tl.constexpr) -> tl.tensor:
    """fp32 numbers of e4m3 or e2m1 codes (int32, not negative).

    Their exponent and mantissa, put where fp32 has its own, are these numbers but for a power of two, denormals
    included.
    """
    if E4M3:
        x = as_float(((code & 0x7F) << 20) | ((code & 0x80) << 24)) * 2.0**120
        x = as_float(tl.where((code & 0x7F) == 0x7F, NAN_BITS, as_bits(x)))
    else:
        x = as_float(((code & 7) << 22) | ((code & 8) << 28)) * 2.0**126
    return x
