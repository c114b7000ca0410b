"""The method a second time, in NumPy, from its description alone: nothing of the project is imported here.

A packet is uint8 `[T, B]`, one row a token:

    [ codes | scales bf16 | outliers bf16 ]     little endian

The scales begin at the next multiple of 2 behind the codes, so a row is a whole multiple of 2. Body features (all but
the outliers) come in ascending order; 4-bit value 2j lies in the low nibble of byte j, 2j+1 in the high one.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

F32 = np.float32
SMALLEST_SCALE = F32(2.0**-100)
ONE_127TH = F32(1.0) / F32(127.0)
BF16_NAN = 0x7FC0
F32_NAN = 0x7FC00000


@dataclass(frozen=True)
class Format:
    """bits: 4 or 8 (codes), 16 (bf16), 32 (fp32). group: values that share a scale on the wire, 0 for static scales."""

    bits: int
    group: int = 0
    outliers: int = 0


def row_nbytes(wire: Format, hidden: int) -> int:
    body = hidden - wire.outliers
    codes = -(-body * wire.bits // 8)
    codes += codes % 2
    scales = 2 * -(-body // wire.group) if wire.group else 0
    return codes + scales + 2 * wire.outliers


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """uint16, nearest, ties to the even neighbour; every NaN becomes 0x7FC0."""
    bits = np.ascontiguousarray(values, dtype=F32).view(np.uint32)
    kept, dropped = bits >> 16, bits & 0xFFFF
    up = (dropped > 0x8000) | ((dropped == 0x8000) & (kept % 2 == 1))
    return np.where(np.isnan(values), BF16_NAN, kept + up).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(F32)


def round_bf16(values: np.ndarray) -> np.ndarray:
    return bf16_values(bf16_bits(values))


def canonical(values: np.ndarray) -> np.ndarray:
    """The same values with one bit pattern for NaN, so that results can be compared as integers."""
    return np.where(np.isnan(values), np.uint32(F32_NAN), np.ascontiguousarray(values, F32).view(np.uint32)).view(F32)


def encode(
    x: np.ndarray,
    wire: Format,
    scale: np.ndarray | None = None,
    outlier_index: np.ndarray | None = None,
) -> np.ndarray:
    """Packet `[T, B]` of FP32 values `[T, H]`. `scale [H-K]`: static scales in body order."""
    tokens, hidden = x.shape
    is_outlier = np.zeros(hidden, dtype=bool)
    if wire.outliers:
        is_outlier[outlier_index] = True
    body = x[:, ~is_outlier]
    scales = np.zeros((tokens, 0), np.uint16)
    with np.errstate(all="ignore"):
        if wire.bits == 32:
            codes = _as_bytes(canonical(body))
        elif wire.bits == 16:
            codes = _as_bytes(bf16_bits(body))
        elif wire.group:
            starts = range(0, body.shape[1], wire.group)
            parts = [_encode_group(body[:, start : start + wire.group], wire.bits) for start in starts]
            if parts:
                scales = np.stack([part[1] for part in parts], axis=1)
                codes = _pack(np.concatenate([part[0] for part in parts], axis=1), wire.bits)
            else:
                codes = np.zeros((tokens, 0), np.uint8)
        else:
            largest = 7 if wire.bits == 4 else 127
            codes = np.clip(np.rint(body * (F32(1.0) / scale)), -largest, largest)
            codes = _pack(np.where(np.isfinite(body), codes, -largest - 1).astype(np.int64), wire.bits)
    packet = np.zeros((tokens, row_nbytes(wire, hidden)), np.uint8)
    at = 0
    for section in (codes, scales, bf16_bits(x[:, is_outlier])):
        as_bytes = _as_bytes(section)
        packet[:, at : at + as_bytes.shape[1]] = as_bytes
        at += as_bytes.shape[1] + as_bytes.shape[1] % 2
    return packet


def decode(
    packet: np.ndarray,
    hidden: int,
    wire: Format,
    scale: np.ndarray | None = None,
    outlier_index: np.ndarray | None = None,
) -> np.ndarray:
    """FP32 values `[T, H]` of a packet."""
    tokens = packet.shape[0]
    is_outlier = np.zeros(hidden, dtype=bool)
    if wire.outliers:
        is_outlier[outlier_index] = True
    body = hidden - wire.outliers
    codes_nbytes = -(-body * wire.bits // 8)
    section = np.ascontiguousarray(packet[:, :codes_nbytes])
    at = codes_nbytes + codes_nbytes % 2
    out = np.zeros((tokens, hidden), F32)
    with np.errstate(all="ignore"):
        if wire.bits == 32:
            out[:, ~is_outlier] = section.view(F32).reshape(tokens, body)
        elif wire.bits == 16:
            out[:, ~is_outlier] = bf16_values(section.view(np.uint16).reshape(tokens, body))
        else:
            codes = _unpack(section, wire.bits)[:, :body]
            if wire.group:
                groups = -(-body // wire.group)
                scales = bf16_values(_uint16(packet[:, at : at + 2 * groups]))
                at += 2 * groups
                out[:, ~is_outlier] = codes.astype(F32) * scales[:, np.arange(body) // wire.group]
            else:
                lost = codes == (-8 if wire.bits == 4 else -128)
                out[:, ~is_outlier] = np.where(lost, F32(np.nan), codes.astype(F32) * scale)
    out[:, is_outlier] = bf16_values(_uint16(packet[:, at : at + 2 * wire.outliers]))
    return canonical(out)


def decode_sum(packets: list[np.ndarray], hidden: int, wire: Format, scales, outlier_index) -> np.ndarray:
    """FP32 sum in rank order, each packet with the scales of its sender."""
    total = decode(packets[0], hidden, wire, None if scales is None else scales[0], outlier_index)
    with np.errstate(all="ignore"):
        for rank, packet in enumerate(packets[1:], start=1):
            total = total + decode(packet, hidden, wire, None if scales is None else scales[rank], outlier_index)
    return canonical(total)


def all_reduce(
    partials: list[np.ndarray],
    reduce_stage: Format,
    gather_stage: Format | None,
    reduce_scales: np.ndarray | None = None,
    gather_scale: np.ndarray | None = None,
    outlier_index: np.ndarray | None = None,
) -> np.ndarray:
    """What every rank holds: packets to the owner, summed there, the sum in a packet to all (two-stage)."""
    hidden = partials[0].shape[1]
    packets = [
        encode(x, reduce_stage, None if reduce_scales is None else reduce_scales[rank], outlier_index)
        for rank, x in enumerate(partials)
    ]
    total = decode_sum(packets, hidden, reduce_stage, reduce_scales, outlier_index)
    if gather_stage is None:
        return total
    packet = encode(total, gather_stage, gather_scale, outlier_index)
    return decode(packet, hidden, gather_stage, gather_scale, outlier_index)


def static_scale(minimum: np.ndarray, maximum: np.ndarray) -> np.ndarray:
    """INT4 scale of each feature: the larger bound over 7, rounded to bf16, not below 2^-100."""
    largest = np.maximum(np.abs(minimum), np.abs(maximum)).astype(F32)
    return np.maximum(round_bf16(largest / F32(7.0)), SMALLEST_SCALE)


def chosen_outliers(minimum: np.ndarray, maximum: np.ndarray, count: int) -> list[int]:
    """The `count` features with the largest range `sum over ranks of 2 max(|m|, |M|)`, lower ones first on a tie."""
    ranges = [
        sum(2.0 * max(abs(float(low)), abs(float(high))) for low, high in zip(lows, highs, strict=True))
        for lows, highs in zip(minimum.T, maximum.T, strict=True)
    ]
    return sorted(sorted(range(len(ranges)), key=lambda feature: (-ranges[feature], feature))[:count])


def _encode_group(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes `[T, G]`, bf16 bits of the scale `[T]`) of one group of each row."""
    finite = np.isfinite(values).all(axis=1)
    if bits == 4:
        high, low = values.max(axis=1), values.min(axis=1)
        wanted = np.where(high >= -low, high, low) / F32(-8.0)
        least, most = -8, 7
    else:
        wanted = np.abs(values).max(axis=1) * ONE_127TH
        least, most = -127, 127
    scale = round_bf16(wanted)
    scale = np.where(np.abs(scale) < SMALLEST_SCALE, SMALLEST_SCALE, scale)
    codes = np.clip(np.rint(values * (F32(1.0) / scale)[:, None]), least, most)
    codes = np.where(finite[:, None], codes, 0).astype(np.int64)
    return codes, np.where(finite, bf16_bits(scale), BF16_NAN).astype(np.uint16)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return (codes % 256).astype(np.uint8)
    tokens, count = codes.shape
    out = np.zeros((tokens, -(-count // 2)), np.uint8)
    for value in range(count):
        out[:, value // 2] += ((codes[:, value] % 16) * (16 if value % 2 else 1)).astype(np.uint8)
    return out


def _unpack(section: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return section.astype(np.int64) - 256 * (section >= 128)
    nibbles = np.zeros((section.shape[0], 2 * section.shape[1]), np.int64)
    nibbles[:, 0::2], nibbles[:, 1::2] = section % 16, section // 16
    return nibbles - 16 * (nibbles >= 8)


def _as_bytes(section: np.ndarray) -> np.ndarray:
    rows, columns = section.shape
    return np.ascontiguousarray(section).view(np.uint8).reshape(rows, columns * section.itemsize)


def _uint16(section: np.ndarray) -> np.ndarray:
    return section[:, 0::2].astype(np.uint16) + section[:, 1::2].astype(np.uint16) * np.uint16(256)
