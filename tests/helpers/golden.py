"""The method a second time, in NumPy, from its description alone: nothing of the project is imported here, but for the
numbers of the code books (`golden_levels.py`), which are no method.

A packet is uint8 `[T, B]`, one row a token, little endian:

    [ planes of codes | row scale bf16 | scales of groups | minimums of groups bf16 | outliers bf16 ]

A section of 16-bit values begins at the next multiple of 2, and a row is a whole multiple of 2. Body features (all but
the outliers) come in ascending order. Codes of 3, 5, 6 and 7 bits are cut into planes of 2+1, 4+1, 4+2 and 4+2+1 bits
from the low end; a plane is a string of bits, value by value, that fills each byte from its low end.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a row, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from helpers.golden_levels import CODE_BOOKS, level_codes, level_values
from helpers.golden_numbers import (
    BF16_NAN,
    E2M1,
    E4M3,
    F32,
    PLANES,
    as_bytes,
    bf16_bits,
    bf16_values,
    canonical,
    pack_planes,
    round_bf16,
    small_float_codes,
    small_float_values,
    uint16,
    unpack_planes,
)

SMALLEST_SCALE = F32(2.0**-100)


@dataclass(frozen=True)
class Format:
    """bits: 2 to 8 (codes), 16 (bf16), 32 (fp32). group: values that share a scale on the wire, 0 for static scales.

    values: "int", "e4m3", "e2m1", "lm", "nf4" or "tc". scales: "bf16", "e4m3" or "e8m0".
    """

    bits: int
    group: int = 0
    outliers: int = 0
    values: str = "int"
    scales: str = "bf16"
    asymmetric: bool = False
    prescaled: bool = False


# ---- rows -----------------------------------------------------------------------------------------------------------


def sections(wire: Format, hidden: int) -> dict[str, tuple[int, int]]:
    """First byte and byte behind the last of every section."""
    body = hidden - wire.outliers
    groups = -(-body // wire.group) if wire.group else 0
    codes = sum(-(-body * width // 8) for width in PLANES.get(wire.bits, [wire.bits]))
    lengths = {
        "codes": codes,
        "row scale": 2 * (wire.scales == "e4m3"),
        "scales": groups * (2 if wire.scales == "bf16" else 1),
        "minimums": 2 * groups * wire.asymmetric,
        "outliers": 2 * wire.outliers,
    }
    places, at = {}, 0
    for name, nbytes in lengths.items():
        if nbytes and (name != "scales" or wire.scales == "bf16"):
            at += at % 2
        places[name] = (at, at + nbytes)
        at += nbytes
    return places


def row_nbytes(wire: Format, hidden: int) -> int:
    end = sections(wire, hidden)["outliers"][1]
    return end + end % 2


def encode(
    x: np.ndarray,
    wire: Format,
    scale: np.ndarray | None = None,
    outlier_index: np.ndarray | None = None,
    minimum: np.ndarray | None = None,
) -> np.ndarray:
    """Packet `[T, B]` of FP32 values `[T, H]`. `scale [H-K]`, `minimum [H-K]`: static, in body order."""
    tokens, hidden = x.shape
    is_outlier = np.zeros(hidden, dtype=bool)
    if wire.outliers:
        is_outlier[outlier_index] = True
    body = x[:, ~is_outlier]
    content = {"outliers": bf16_bits(x[:, is_outlier])}
    with np.errstate(all="ignore"):
        if wire.bits == 32:
            content["codes"] = canonical(body)
        elif wire.bits == 16:
            content["codes"] = bf16_bits(body)
        elif wire.group:
            y = body * (F32(1.0) / scale) if wire.prescaled else body
            content |= _encode_groups(y, wire)
        else:
            content["codes"] = pack_planes(_static_codes(body, wire, F32(1.0) / scale, minimum), wire.bits)
    packet = np.zeros((tokens, row_nbytes(wire, hidden)), np.uint8)
    for name, (start, stop) in sections(wire, hidden).items():
        if start < stop:
            packet[:, start:stop] = as_bytes(content[name])
    return packet


def decode(
    packet: np.ndarray,
    hidden: int,
    wire: Format,
    scale: np.ndarray | None = None,
    outlier_index: np.ndarray | None = None,
    minimum: np.ndarray | None = None,
) -> np.ndarray:
    """FP32 values `[T, H]` of a packet."""
    is_outlier = np.zeros(hidden, dtype=bool)
    if wire.outliers:
        is_outlier[outlier_index] = True
    body = hidden - wire.outliers
    part = {name: packet[:, start:stop] for name, (start, stop) in sections(wire, hidden).items()}
    out = np.zeros((packet.shape[0], hidden), F32)
    with np.errstate(all="ignore"):
        if wire.bits == 32:
            out[:, ~is_outlier] = np.ascontiguousarray(part["codes"]).view(F32).reshape(-1, body)
        elif wire.bits == 16:
            out[:, ~is_outlier] = bf16_values(uint16(part["codes"]))
        else:
            codes = unpack_planes(part["codes"], wire.bits, body)
            if wire.group:
                group_of = np.arange(body) // wire.group
                values = _meaning(codes, wire) * _group_scales(part, wire)[:, group_of]
                if wire.asymmetric:
                    values = values + bf16_values(uint16(part["minimums"]))[:, group_of]
                if wire.prescaled:
                    values = values * scale
            else:
                values = _meaning(codes, wire) * scale
                if wire.asymmetric:
                    values = values + minimum
                values = np.where(codes == _lost_code(wire), F32(np.nan), values)
            out[:, ~is_outlier] = values
    out[:, is_outlier] = bf16_values(uint16(part["outliers"]))
    return canonical(out)


def decode_sum(packets: list[np.ndarray], hidden: int, wire: Format, scales, outlier_index, minimums=None):
    """FP32 sum in rank order, each packet with the scales and minimums of its sender."""

    def decoded(rank):
        own = [None if table is None else table[rank] for table in (scales, minimums)]
        return decode(packets[rank], hidden, wire, own[0], outlier_index, own[1])

    total = decoded(0)
    with np.errstate(all="ignore"):
        for rank in range(1, len(packets)):
            total = total + decoded(rank)
    return canonical(total)


# ---- codes ----------------------------------------------------------------------------------------------------------


def _lost_code(wire: Format) -> int:
    """The code, from 0 up, of a value that is not finite, where scales are static."""
    if wire.values == "int":
        return 2**wire.bits - 1 if wire.asymmetric else 2 ** (wire.bits - 1)
    return {"e4m3": 0x7F, "e2m1": 8}[wire.values]


def _static_codes(body: np.ndarray, wire: Format, inverse: np.ndarray, minimum: np.ndarray | None) -> np.ndarray:
    if wire.values != "int":
        codes = _float_codes(body * inverse, wire)
    elif wire.asymmetric:
        codes = np.clip(np.rint((body - minimum) * inverse), 0, 2**wire.bits - 2)
    else:
        largest = 2 ** (wire.bits - 1) - 1
        codes = np.clip(np.rint(body * inverse), -largest, largest)
    return np.where(np.isfinite(body), codes, _lost_code(wire)).astype(np.int64)


def _float_codes(values: np.ndarray, wire: Format) -> np.ndarray:
    codes = small_float_codes(values, E4M3 if wire.values == "e4m3" else E2M1)
    return np.where(codes == 8, 0, codes) if wire.values == "e2m1" else codes


def _meaning(codes: np.ndarray, wire: Format) -> np.ndarray:
    """Codes from 0 up to the numbers they stand for before any scale."""
    if wire.values in CODE_BOOKS:
        return level_values(codes, wire.values, wire.bits, wire.group)
    if wire.values != "int":
        return small_float_values(codes, E4M3 if wire.values == "e4m3" else E2M1)
    if wire.asymmetric:
        return codes.astype(F32)
    return np.where(codes >= 2 ** (wire.bits - 1), codes - 2**wire.bits, codes).astype(F32)


def _encode_groups(y: np.ndarray, wire: Format) -> dict[str, np.ndarray]:
    """Contents of the sections of rows of groups."""
    tokens, count = y.shape
    parts = [y[:, start : start + wire.group] for start in range(0, count, wire.group)]
    finite, low, wanted = (np.zeros((tokens, len(parts)), kind) for kind in (bool, F32, F32))
    for group, part in enumerate(parts):
        finite[:, group] = np.isfinite(part).all(axis=1)
        if wire.asymmetric:
            low[:, group] = round_bf16(part.min(axis=1)) + F32(0)  # never -0
            finite[:, group] &= np.isfinite(low[:, group])  # a minimum that bf16 cannot hold
        wanted[:, group] = _wanted(part, low[:, group], wire)
    row_scale = _row_scale(np.where(finite, wanted, F32(0)))
    bits, scale = _scale_bits(wanted, row_scale, wire)
    codes = [np.zeros((tokens, 0), np.int64)]
    for group, part in enumerate(parts):
        scaled = (part - low[:, group, None]) * (F32(1.0) / scale[:, group, None])
        if wire.values in CODE_BOOKS:
            scaled = level_codes(scaled, wire.values, wire.bits)
        elif wire.values == "int":
            scaled = np.clip(np.rint(scaled), *_group_range(wire))
        else:
            scaled = _float_codes(scaled, wire)
        codes.append(np.where(finite[:, group, None], scaled, 0).astype(np.int64))
    no_scale = {"bf16": BF16_NAN, "e4m3": 0x7F, "e8m0": 0xFF}[wire.scales]
    return {
        "codes": pack_planes(np.concatenate(codes, axis=1), wire.bits),
        "row scale": bf16_bits(row_scale),
        "scales": np.where(finite, bits, no_scale).astype(np.uint16 if wire.scales == "bf16" else np.uint8),
        "minimums": np.where(finite, bf16_bits(low), BF16_NAN).astype(np.uint16),
    }


def _group_range(wire: Format) -> tuple[int, int]:
    if wire.asymmetric:
        return 0, 2**wire.bits - 1
    half = 2 ** (wire.bits - 1)
    return -half + (wire.bits == 8 or wire.scales == "e8m0"), half - 1


def _wanted(part: np.ndarray, low: np.ndarray, wire: Format) -> np.ndarray:
    """The scale `[T]` of one group of each row before it is rounded: what the largest magnitude should stand for."""
    amax = np.abs(part).max(axis=1)
    peak = np.where(part.max(axis=1) == amax, amax, -amax)
    if wire.values in CODE_BOOKS:
        return -peak if wire.values in ("lm", "tc") else amax
    if wire.values != "int" and wire.scales == "e8m0":  # 448 = 1.75 * 2^8, 6 = 1.5 * 2^2
        return amax / F32(256 if wire.values == "e4m3" else 4)
    if wire.values != "int":
        return amax * (F32(1) / F32(448 if wire.values == "e4m3" else 6))
    if wire.asymmetric:
        one = F32(1) / F32(2**wire.bits - 1)
        return np.abs(part.max(axis=1) * one - low * one)
    if wire.bits == 8 or wire.scales == "e8m0":
        return amax * (F32(1) / F32(2 ** (wire.bits - 1) - 1))
    return peak / F32(-(2 ** (wire.bits - 1)))


def _row_scale(wanted: np.ndarray) -> np.ndarray:
    """`[T, 1]`: brings the largest wanted scale to 448."""
    largest = np.abs(wanted).max(axis=1, keepdims=True, initial=0)
    return np.maximum(round_bf16(largest * (F32(1) / F32(448))), SMALLEST_SCALE)


def _scale_bits(wanted: np.ndarray, row_scale: np.ndarray, wire: Format) -> tuple[np.ndarray, np.ndarray]:
    """Scales `[T, G]` as they travel, and the FP32 numbers that they are."""
    if wire.scales == "e8m0":
        mantissa, exponent = np.frexp(wanted)  # mantissa from 0.5 to below 1: the power of two below is one less
        exponent = exponent - ((mantissa == 0.5) | (wire.values != "int"))  # integers take the one above
        bits = np.where(wanted == 0, 27, np.clip(exponent + 127, 27, 254)).astype(np.uint8)
        return bits, np.exp2(bits.astype(np.float64) - 127).astype(F32)
    if wire.scales == "e4m3":
        bits = small_float_codes(wanted * (F32(1) / row_scale), E4M3)
        bits = np.where(bits % 128 == 0, 1, bits)
        return bits, small_float_values(bits, E4M3) * row_scale
    scale = round_bf16(wanted)
    scale = np.where(np.abs(scale) < SMALLEST_SCALE, SMALLEST_SCALE, scale)
    return bf16_bits(scale), scale


def _group_scales(part: dict[str, np.ndarray], wire: Format) -> np.ndarray:
    """FP32 scales `[T, G]` of a packet."""
    if wire.scales == "bf16":
        return bf16_values(uint16(part["scales"]))
    if wire.scales == "e4m3":
        return small_float_values(part["scales"], E4M3) * bf16_values(uint16(part["row scale"]))
    powers = np.exp2(np.maximum(part["scales"], 27).astype(np.float64) - 127)
    return np.where(part["scales"] == 255, np.nan, np.minimum(powers, 2.0**127)).astype(F32)
