"""The bytes of one packet row: integer arithmetic only.

A packet is a uint8 tensor `[T, B]`, one self-contained row a token, so a packet of tokens a..b is rows a..b, a view:

    [ planes of codes | row scale bf16 | group scales | group minimums bf16 | outliers bf16 ]

little endian. Sections that a layout has no use for are absent; those of 16-bit values start at an even byte; gaps are
zero; B is a multiple of 2.

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a row, G groups of a row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

Values = Literal["int", "e4m3", "e2m1", "lm", "nf4", "tc"]
ScaleFormat = Literal["bf16", "e4m3", "e8m0"]

VALUE_BITS = (16, 32)
CODE_BITS: dict[str, tuple[int, ...]] = {
    "int": (2, 3, 4, 5, 6, 7, 8),
    "e4m3": (8,),
    "e2m1": (4,),
    "lm": (2, 3, 4),
    "nf4": (4,),
    "tc": (2, 3, 4),
}
#: Values that are levels of a code book, see `codebooks.py`.
CODE_BOOKS = ("lm", "nf4", "tc")
SCALE_FORMATS = ("bf16", "e4m3", "e8m0")
# Widths that divide 8, so that no value of a plane crosses a byte.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


@dataclass(frozen=True)
class PacketLayout:
    """Where the sections of a packet row lie. Offsets and sizes are in bytes.

    features: H, at least 1.
    bits: 2 to 8 are codes; 16 are bf16 and 32 fp32 values, which take none of the options below.
    group_size: 0 means static per-feature scales, known to both ends and not on the wire; above 0, one scale per
        `group_size` consecutive body values is on the wire (the last group may be shorter).
    outliers: K features sent as bf16 in a section of their own. The set is static: no index travels.
    values: what a code is. "int": an integer of 2 to 8 bits; "e4m3": FP8 e4m3fn, 8 bits (largest 448, NaN 0x7F and
        0xFF); "e2m1": FP4, 4 bits (0, 0.5, 1, 1.5, 2, 3, 4, 6, bit 3 the sign); "lm" (2, 3 or 4 bits) and "nf4" (4):
        the index of a level of `codebooks.py`, which go with groups only (no code is left for "not finite") and with
        scale_format "bf16" or "e4m3" (a power of two would waste the levels at the ends). "tc" (2, 3 or 4 bits): the
        same, but which levels there are depends on the codes before, see `reference_trellis.py`.
    scale_format: how a group scale travels. "bf16", 2 bytes; "e8m0", 1 byte, a power of two; "e4m3", 1 byte, times one
        bf16 scale of the row.
    asymmetric: integers count up from a minimum instead of around 0. With group_size 0 the minimum is static, else a
        bf16 minimum of each group is on the wire. Only with values "int" and scale_format "bf16".
    prescaled: values are divided by static per-feature scales before they are grouped, and multiplied after.

    MXFP4 of the OCP is values "e2m1", group_size 32, scale_format "e8m0"; MXFP8 the same with "e4m3"; NVIDIA's NVFP4
    is "e2m1", group_size 16, scale_format "e4m3" (its second scale, of the tensor there, is of the row here).

    A code is cut into planes from its low bits up (`planes`: 5 bits are planes of 4 and 1). A plane is a section of its
    own without gaps before it: value i occupies `width` bits from bit `i * width` on, counted from the low end of each
    byte. Integer codes are two's complement, those of asymmetric layouts unsigned, and so are indices of levels.

    Raises ValueError for a combination that has no meaning.
    """

    features: int
    bits: int
    group_size: int = 0
    outliers: int = 0
    values: Values = "int"
    scale_format: ScaleFormat = "bf16"
    asymmetric: bool = False
    prescaled: bool = False

    def __post_init__(self) -> None:
        if self.features < 1:
            raise ValueError(f"features is {self.features}; a packet row needs at least 1 feature")
        if self.values not in CODE_BITS:
            raise ValueError(f"values is {self.values!r}; allowed: {', '.join(CODE_BITS)}")
        if self.scale_format not in SCALE_FORMATS:
            raise ValueError(f"scale_format is {self.scale_format!r}; allowed: {', '.join(SCALE_FORMATS)}")
        if self.bits not in CODE_BITS[self.values] + (VALUE_BITS if self.values == "int" else ()):
            raise ValueError(
                f"bits is {self.bits} with values {self.values!r}; allowed: 2 to 8 (int), 8 (e4m3), 4 (e2m1, nf4), "
                "2 to 4 (lm, tc), and without other options 16 (bf16) or 32 (fp32)"
            )
        if self.group_size < 0:
            raise ValueError(f"group_size is {self.group_size}; allowed: 0 (static scales) or a positive group size")
        if not 0 <= self.outliers <= self.features:
            raise ValueError(f"outliers is {self.outliers}; allowed: 0 to features={self.features}")
        if self.bits in VALUE_BITS and (self.group_size or self.outliers):
            raise ValueError(
                f"bits={self.bits} sends plain values: group_size={self.group_size} and outliers={self.outliers} "
                "must both be 0 (scales and outliers go with 2 to 8 bits)"
            )
        if self.asymmetric and (self.bits in VALUE_BITS or self.values != "int" or self.scale_format != "bf16"):
            raise ValueError(
                f"asymmetric with bits={self.bits}, values {self.values!r}, scale_format {self.scale_format!r}; "
                "allowed: 2 to 8 bits, values 'int', scale_format 'bf16'"
            )
        if self.has_levels and (not self.group_size or self.scale_format == "e8m0"):
            raise ValueError(
                f"values {self.values!r} with group_size={self.group_size}, scale_format {self.scale_format!r}; levels "
                "of a code book go with groups only; allowed: a group_size above 0 and scale_format 'bf16' or 'e4m3'"
            )
        if not self.group_size and (self.scale_format != "bf16" or self.prescaled):
            raise ValueError(
                f"group_size is 0 with scale_format {self.scale_format!r}, prescaled={self.prescaled}; without groups "
                "only scale_format 'bf16' and prescaled=False are allowed (no scale travels); give a group_size"
            )

    @functools.cached_property
    def has_codes(self) -> bool:
        """True where body values travel as codes of 2 to 8 bits."""
        return self.bits not in VALUE_BITS

    @functools.cached_property
    def has_levels(self) -> bool:
        """True where codes are indices of a code book's levels."""
        return self.values in CODE_BOOKS

    @functools.cached_property
    def has_trellis(self) -> bool:
        """True where the level of a code depends on the codes before it in the group."""
        return self.values == "tc"

    @functools.cached_property
    def needs_static(self) -> bool:
        """True where encode needs `inverse_scale` and decode needs `scale`."""
        return self.has_codes and (self.group_size == 0 or self.prescaled)

    @functools.cached_property
    def needs_minimum(self) -> bool:
        """True where encode and decode need the static `minimum`."""
        return self.asymmetric and self.group_size == 0

    @functools.cached_property
    def body(self) -> int:
        """H - K: values that are not outliers, in ascending feature order."""
        return self.features - self.outliers

    @functools.cached_property
    def groups(self) -> int:
        """G, scales on the wire in a row."""
        return -(-self.body // self.group_size) if self.group_size else 0

    @functools.cached_property
    def planes(self) -> tuple[int, ...]:
        """Bits of a code in each plane, low bits first; they add up to `bits`. Empty for plain values."""
        return PLANES.get(self.bits, ())

    @functools.cached_property
    def plane_offsets(self) -> tuple[int, ...]:
        """First byte of each plane."""
        nbytes = [_nbytes(self.body * width) for width in self.planes]
        return tuple(sum(nbytes[:plane]) for plane in range(len(nbytes)))

    @functools.cached_property
    def codes_nbytes(self) -> int:
        """Bytes of all planes together, or of the values themselves for 16 and 32 bits."""
        return sum(_nbytes(self.body * width) for width in self.planes or (self.bits,))

    @functools.cached_property
    def row_scale_offset(self) -> int:
        """First byte of the row scale, where there is one: the end of the codes rounded up to 2."""
        return _even(self.codes_nbytes)

    @functools.cached_property
    def row_scale_nbytes(self) -> int:
        """2 where group scales are e4m3, else 0."""
        return 2 if self.scale_format == "e4m3" else 0

    @functools.cached_property
    def scale_nbytes(self) -> int:
        """Bytes of one group scale."""
        return 2 if self.scale_format == "bf16" else 1

    @functools.cached_property
    def scales_offset(self) -> int:
        """First byte of the group scales. Even, so that 16-bit loads are aligned, but for e8m0 without a gap."""
        return self.codes_nbytes if self.scale_format == "e8m0" else self.row_scale_offset + self.row_scale_nbytes

    @functools.cached_property
    def scales_end(self) -> int:
        """The byte behind the group scales, before the gap that may follow them."""
        return self.scales_offset + self.scale_nbytes * self.groups

    @functools.cached_property
    def minimums_offset(self) -> int:
        """First byte of the minimums of the groups, one bf16 each where the layout is asymmetric."""
        return _even(self.scales_end)

    @functools.cached_property
    def outliers_offset(self) -> int:
        """First byte of the outliers."""
        return self.minimums_offset + (2 * self.groups if self.asymmetric else 0)

    @functools.cached_property
    def row_nbytes(self) -> int:
        """B, a multiple of 2, so that the 16-bit parts of all rows are aligned.

        Not of 4: at H = 576 that would cost 0.03 bits a value, and rows of usual widths are multiples of 16 anyway.
        """
        return self.outliers_offset + 2 * self.outliers

    @functools.cached_property
    def nominal_bits_per_value(self) -> float:
        """Bits a feature of codes, scales, minimums and outliers, without padding."""
        sides = 8 * (self.row_scale_nbytes + self.groups * (self.scale_nbytes + 2 * self.asymmetric))
        return (self.body * self.bits + sides + 16 * self.outliers) / self.features

    @functools.cached_property
    def wire_bits_per_value(self) -> float:
        """Bits on the wire a feature, with scales, outliers and padding."""
        return 8 * self.row_nbytes / self.features


def _nbytes(bits: int) -> int:
    return -(-bits // 8)


def _even(nbytes: int) -> int:
    return nbytes + nbytes % 2
