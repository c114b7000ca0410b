"""Triton: what kernels are told of a layout, and how their work is cut. Runs on the host; no kernel is here.

`Format` is compiled into a kernel. Sizes are numbers that it reads, so that layouts of other widths share it.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a packet row.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_kernels import codebooks
from lowbit_kernels.layout import CODE_BOOKS, PacketLayout

#: Values of a tile where one program holds a part of a row: 4 or 8 for each of 128 threads.
DECODE_TILE = 512
ENCODE_TILE = 1024
#: The largest group whose values one program holds in its registers.
LARGEST_TILE = 4096
#: Where scales in e4m3 need a row scale, one program takes a whole row, up to so many values in one tile of registers.
JUDGED_TILE = 8192
#: From so many tiles on, a program takes `MANY_ROWS` of one column: static numbers are read once for all of them.
MANY_TILES = 8192
MANY_ROWS = 4
#: The bits of 2^23 as a run-time number, see quads.py.
MAGIC = 0x4B000000


@dataclass(frozen=True)
class Format:
    """What a layout is but for its sizes.

    values: "int", "e4m3", "e2m1", "lm", "nf4" or "tc"; bits 16 and 32 are plain values. scales: "none" (plain values),
    "static", or how the scale of a group travels. outliers: whether there are any. word_nbytes: the widest word that
    may be loaded from or stored into the codes of any row, 4 or 2, after what their addresses are divisible by. unit:
    8, 4 or 1, the largest that divides the body: what masks one value of such a unit masks them all.
    """

    bits: int
    values: str
    scales: str
    asymmetric: bool
    prescaled: bool
    outliers: bool
    word_nbytes: int
    unit: int

    @property
    def plain(self) -> bool:
        """True for values that travel as they are."""
        return self.scales == "none"

    @property
    def grouped(self) -> bool:
        """True where a scale travels for each group of values."""
        return self.scales not in ("none", "static")

    @property
    def needs_static(self) -> bool:
        """True where static scales are given."""
        return self.scales == "static" or self.prescaled

    @property
    def needs_minimum(self) -> bool:
        """True where static minimums are given."""
        return self.scales == "static" and self.asymmetric

    @property
    def is_int(self) -> bool:
        """True for integer codes."""
        return not self.plain and self.values == "int"

    @property
    def has_levels(self) -> bool:
        """True where codes are indices of a code book's levels."""
        return self.values in CODE_BOOKS

    @property
    def has_trellis(self) -> bool:
        """True where the level of a code depends on the codes before it in the group."""
        return self.values == "tc"

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels of a code book."""
        return codebooks.levels(self.values, self.bits)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """What the levels of a code book lie between."""
        return codebooks.thresholds(self.values, self.bits)

    @property
    def level_pairs(self) -> tuple[int, ...]:
        """The levels of a code book in bf16, two to an int32, the lower one in its lower half."""
        in_bf16 = b"".join(struct.pack("<f", level)[2:] for level in self.levels)
        return struct.unpack(f"<{len(self.levels) // 2}i", in_bf16)

    @property
    def half(self) -> int:
        """The sign bit of two's complement integer codes, 0 for others: codes are unsigned numbers xor this."""
        return 2 ** (self.bits - 1) if self.is_int and not self.asymmetric else 0

    @property
    def lowest(self) -> int:
        """The lowest integer code that encoding gives."""
        if self.asymmetric:
            return 0
        full = self.grouped and self.scales != "e8m0" and self.bits < 8
        return -(2 ** (self.bits - 1)) + (not full)

    @property
    def highest(self) -> int:
        """The highest integer code that encoding gives, but for the one that means "not finite"."""
        if self.asymmetric:
            return 2**self.bits - (1 if self.grouped else 2)
        return 2 ** (self.bits - 1) - 1

    @property
    def lost(self) -> int:
        """The bits of the code that means "not finite" where scales are static."""
        if self.values == "e4m3":
            return 0x7F
        return 8 if self.values == "e2m1" else self.half if self.half else 2**self.bits - 1

    @property
    def lost_apart(self) -> bool:
        """True where codes that mean "not finite" do not decode to NaN by themselves."""
        return self.scales == "static" and self.values != "e4m3"

    @property
    def signed_peak(self) -> bool:
        """True where the value of largest magnitude, with its sign, becomes the lowest code."""
        if self.has_levels:
            return self.values == "lm"
        return self.is_int and not self.asymmetric and self.bits < 8 and self.scales != "e8m0"

    @property
    def step(self) -> float:
        """What the largest magnitude (or the signed peak, or the range) of a group is multiplied by, exactly fp32."""
        if self.has_levels:
            return -1.0 if self.signed_peak else 1.0
        if self.signed_peak:
            return -(0.5 ** (self.bits - 1))
        largest = {"e4m3": 448, "e2m1": 6, "int": self.highest}[self.values]
        return float(struct.unpack("<f", struct.pack("<f", 1 / largest))[0])

    @property
    def bias(self) -> int:
        """What integer codes of one plane are raised by while they are packed, so that none is negative."""
        return self.half if self.planes == 1 else 0

    @property
    def word_base(self) -> int:
        """What the bits of the rounding constant add up to in a word of one plane, as an int32."""
        rounded_zero = 0x4B400000 if self.is_int else 0
        total = sum(rounded_zero << (self.bits * place) for place in range(min(8, 32 // self.bits))) % 2**32
        return total - (total >> 31 << 32)

    @property
    def word_flip(self) -> int:
        """Turns unsigned numbers in a word of one plane into two's complement: the sign bit of each, as an int32."""
        total = sum(self.bias << (self.bits * place) for place in range(min(8, 32 // self.bits)))
        return total - (total >> 31 << 32)

    @property
    def planes(self) -> int:
        """How many planes a code is cut into."""
        return 0 if self.plain else {3: 2, 5: 2, 6: 2, 7: 3}.get(self.bits, 1)


Stride: TypeAlias = "int | tl.constexpr"


class Rows(NamedTuple):
    """Rows of values in memory, fp32 or bf16 as integers of as many bits, and the elements from one to the next."""

    data: Tensor
    stride: Stride


class Source(NamedTuple):
    """R packets that are decoded, and what they are decoded with; None where a format does not need it."""

    packets: tuple[Tensor, ...]
    strides: tuple[Stride, ...]
    scale: Tensor | None
    scale_stride: int
    minimum: Tensor | None
    minimum_stride: int


class Target(NamedTuple):
    """The packet that is written, and what it is encoded with."""

    packet: Tensor
    stride: Stride
    inverse_scale: Tensor | None
    minimum: Tensor | None


def format_of(layout: PacketLayout, packets: Sequence[Tensor]) -> Format:
    """The format of a layout, whose packets are these."""
    scales = "none" if not layout.has_codes else layout.scale_format if layout.group_size else "static"
    at_words = all(packet_TB.data_ptr() % 4 == 0 and packet_TB.stride(0) % 4 == 0 for packet_TB in packets)
    return Format(
        bits=layout.bits,
        values=layout.values,
        scales=scales,
        asymmetric=layout.asymmetric,
        prescaled=layout.prescaled,
        outliers=layout.outliers > 0,
        word_nbytes=4 if at_words else 2,
        unit=8 if layout.body % 8 == 0 else 4 if layout.body % 4 == 0 else 1,
    )


def source_of(
    packets: Sequence[Tensor],
    layout: PacketLayout,
    scale_RH: Tensor | None,
    minimum_RH: Tensor | None,
    rows: int,
) -> Source:
    """For programs of `rows` rows. Raise ValueError for packets that are not aligned for their widest values."""
    for packet_TB in packets:
        check_alignment(packet_TB, layout)
    return Source(
        tuple(packets),
        tuple(stride_of(packet_TB, rows) for packet_TB in packets),
        scale_RH,
        0 if scale_RH is None else scale_RH.stride(0),
        minimum_RH,
        0 if minimum_RH is None else minimum_RH.stride(0),
    )


def target_of(
    packet_TB: Tensor, layout: PacketLayout, inverse_scale: Tensor | None, minimum: Tensor | None, rows: int
) -> Target:
    """For programs of `rows` rows. Raise ValueError for a packet that is not aligned for its widest values."""
    check_alignment(packet_TB, layout)
    return Target(packet_TB, stride_of(packet_TB, rows), inverse_scale, minimum)


def rows_as_bits(values_TH: Tensor, rows: int) -> Rows:
    """Rows of fp32 or bf16 values for programs of `rows` rows."""
    return Rows(
        values_TH.view(torch.int16 if values_TH.dtype == torch.bfloat16 else torch.int32), stride_of(values_TH, rows)
    )


def stride_of(tensor: Tensor, rows: int) -> Stride:
    """Elements from row to row: compiled into programs of several rows, whose addresses are then one and constants."""
    return tl.constexpr(tensor.stride(0)) if rows > 1 else tensor.stride(0)


def check_alignment(packet_TB: Tensor, layout: PacketLayout) -> None:
    """Raise ValueError where scales and outliers (16 bits) or values (32 bits) could not be loaded whole."""
    needed = 4 if layout.bits == 32 else 2
    if packet_TB.data_ptr() % needed or packet_TB.stride(0) % needed:
        raise ValueError(
            f"packet rows start at address {packet_TB.data_ptr()} with {packet_TB.stride(0)} bytes between them; "
            f"the Triton codec needs multiples of {needed}, as rows of a fresh uint8 tensor have"
        )


def decodes_in_quads(layout: PacketLayout) -> bool:
    """Whether four values at a time can be decoded: they are in one word of each plane, and share a scale.

    A value of a trellis needs the codes before it, which may be in another word.
    """
    in_quads = layout.body % 4 == 0 and layout.group_size % 4 == 0 and not layout.has_trellis
    return not layout.has_codes or in_quads


def encodes_in_units(layout: PacketLayout) -> bool:
    """Whether eight values at a time can be encoded, and groups by a reduction inside of a tile."""
    size = layout.group_size
    group = size == 0 or (8 <= size <= LARGEST_TILE and size & (size - 1) == 0)
    return not layout.has_codes or (group and layout.body % 8 == 0)


def rows_of_program(tokens: int, tiles: int) -> int:
    """How many rows one program takes: several where there is work for all of a GPU anyway."""
    return MANY_ROWS if tokens * tiles >= MANY_TILES else 1


def tiles_of(values: int, tile: int) -> int:
    """Tiles of a row, at least one: a row without body values has outliers all the same."""
    return max(1, triton.cdiv(values, tile))
