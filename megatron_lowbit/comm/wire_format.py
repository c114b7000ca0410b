"""WireFormat: how one stage of the collective writes a row of values as bytes. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit_kernels.layout import PacketLayout

CODE_BITS = (4, 8)
FLOAT_BITS = (16, 32)


@dataclass(frozen=True)
class WireFormat:
    """One stage's format.

    bits: 4 or 8 for integer codes, 16 for BF16 and 32 for FP32 values.
    group_size: 0 for calibrated static scales (nothing on the wire), else one BF16 scale travels for every
        `group_size` values.
    outlier_divisor: 0 for none, else `floor(hidden / outlier_divisor)` features travel as BF16 (the paper: 64).
    """

    bits: int
    group_size: int = 0
    outlier_divisor: int = 0

    def __post_init__(self) -> None:
        if self.bits not in CODE_BITS + FLOAT_BITS:
            raise ValueError(
                f"wire format: {self.bits} bits; allowed are codes of {CODE_BITS} or floats of {FLOAT_BITS}"
            )
        if self.group_size < 0 or self.outlier_divisor < 0:
            raise ValueError(f"wire format: group_size {self.group_size} and outlier_divisor must not be negative")
        if self.bits in FLOAT_BITS and (self.group_size or self.outlier_divisor):
            raise ValueError(f"wire format: {self.bits}-bit floats take neither scales nor outliers")

    @property
    def is_static(self) -> bool:
        """True where the codes need calibrated scales."""
        return self.bits in CODE_BITS and self.group_size == 0

    def outlier_count(self, hidden: int) -> int:
        return hidden // self.outlier_divisor if self.outlier_divisor else 0

    def packet_layout(self, hidden: int) -> PacketLayout:
        """Where codes, scales and outliers of one row of `hidden` values lie."""
        return PacketLayout(
            features=hidden, bits=self.bits, group_size=self.group_size, outliers=self.outlier_count(hidden)
        )

    def bits_per_value(self, hidden: int) -> float:
        """Nominal bits: codes, scales and outliers, without the padding of a row."""
        layout = self.packet_layout(hidden)
        return (layout.body * self.bits + 16 * layout.groups + 16 * layout.outliers) / hidden

    def wire_bits_per_value(self, hidden: int) -> float:
        """Bits that really travel: rows are whole multiples of 2 bytes. The same for any token count."""
        return self.packet_layout(hidden).wire_bits_per_value
