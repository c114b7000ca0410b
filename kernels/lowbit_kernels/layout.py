"""The bytes of one packet row: integer arithmetic only.

A packet is a uint8 tensor `[T, B]`, one self-contained row a token, so a packet of tokens a..b is rows a..b, a view:

    [ codes | scales bf16 | outliers bf16 | zero padding ]      little endian, B a multiple of 2

Legend: T tokens, H hidden features, K outliers, R ranks, B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

CODE_BITS = (4, 8)
VALUE_BITS = (16, 32)


@dataclass(frozen=True)
class PacketLayout:
    """Where the sections of a packet row lie. Offsets and sizes are in bytes.

    features: H, at least 1.
    bits: 4 or 8 are two's complement integer codes (4-bit: value 2j in the low nibble of byte j, 2j+1 in the high
        one); 16 are bf16 and 32 fp32 values, with neither scales nor outliers.
    group_size: 0 means static per-feature scales, known to both ends and not on the wire; above 0, one bf16 scale per
        `group_size` consecutive body values is on the wire (the last group may be shorter).
    outliers: K features sent as bf16 in a section of their own. The set is static: no index travels.

    Raises ValueError for a combination that has no meaning.
    """

    features: int
    bits: int
    group_size: int = 0
    outliers: int = 0

    def __post_init__(self) -> None:
        if self.features < 1:
            raise ValueError(f"features is {self.features}; a packet row needs at least 1 feature")
        if self.bits not in CODE_BITS + VALUE_BITS:
            raise ValueError(f"bits is {self.bits}; allowed: 4 or 8 (integer codes), 16 (bf16), 32 (fp32)")
        if self.group_size < 0:
            raise ValueError(f"group_size is {self.group_size}; allowed: 0 (static scales) or a positive group size")
        if not 0 <= self.outliers <= self.features:
            raise ValueError(f"outliers is {self.outliers}; allowed: 0 to features={self.features}")
        if self.bits in VALUE_BITS and (self.group_size or self.outliers):
            raise ValueError(
                f"bits={self.bits} sends plain values: group_size={self.group_size} and outliers={self.outliers} "
                "must both be 0 (scales and outliers go with 4 or 8 bits)"
            )

    @property
    def has_codes(self) -> bool:
        """True where body values travel as integer codes (4 or 8 bits)."""
        return self.bits in CODE_BITS

    @property
    def static_scales(self) -> bool:
        """True where encode needs `inverse_scale` and decode needs `scale`."""
        return self.has_codes and self.group_size == 0

    @property
    def body(self) -> int:
        """H - K: values that are not outliers, in ascending feature order."""
        return self.features - self.outliers

    @property
    def groups(self) -> int:
        """Scales on the wire in a row."""
        return -(-self.body // self.group_size) if self.group_size else 0

    @property
    def codes_nbytes(self) -> int:
        """Bytes of the first section: codes, or the values themselves for 16 and 32 bits."""
        return (self.body * self.bits + 7) // 8

    @property
    def scales_offset(self) -> int:
        """First byte of the scales: the codes section rounded up to 2, so that 16-bit loads are aligned."""
        return (self.codes_nbytes + 1) // 2 * 2

    @property
    def outliers_offset(self) -> int:
        """First byte of the outliers."""
        return self.scales_offset + 2 * self.groups

    @property
    def row_nbytes(self) -> int:
        """B, a multiple of 2, so that the 16-bit parts of all rows are aligned.

        Not of 4: at H = 576 that would cost 0.03 bits a value, and rows of usual widths are multiples of 16 anyway.
        """
        return self.outliers_offset + 2 * self.outliers

    @property
    def wire_bits_per_value(self) -> float:
        """Bits on the wire a feature, with scales, outliers and padding."""
        return 8 * self.row_nbytes / self.features
