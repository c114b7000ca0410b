"""WireFormat: how one stage of the collective writes a row of values as bytes. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowbit_kernels.layout import PacketLayout, ScaleFormat, Values
from lowbit_kernels.rotation import Block, check_block

#: As a group size, beyond any width: all values of a row that are not sent as BF16.
WHOLE_ROW = 2**40


#: Evens features out half-way: the squared error of a group whose scale follows its largest value is least.
EXPONENT = 0.5


@dataclass(frozen=True)
class WireFormat:
    """One stage's format. Its options are those of `PacketLayout`, where the bytes are described.

    bits: 2 to 8 for codes, 16 for BF16 and 32 for FP32 values, which take no other option.
    group_size: 0 for calibrated static scales (nothing on the wire), else a scale travels for every `group_size`
        values; WHOLE_ROW for one scale a row, whatever its width.
    outlier_divisor: 0 for none, else `floor(hidden / outlier_divisor)` features travel as BF16 (the paper: 64).
    values: what codes are: "int", "e4m3" (FP8), "e2m1" (FP4), or levels of a code book, "lm", "nf4" or "tc", which need
        scales that travel, in "bf16" or "e4m3".
    scale_format: how the scales of groups travel: "bf16", "e4m3" (with one BF16 scale a row) or "e8m0".
    asymmetric: integers between a minimum and a maximum instead of around 0; of each group, or calibrated.
    prescaled: features are divided by calibrated factors before they are grouped: by their root mean square to the
        power of `exponent`.
    fitted: static scales are those of least squared error instead of those that cover the range.
    rotation: features are mixed in blocks of so many (a power of two), or "full", before they are grouped; 0 for not.

    Raises ValueError for a combination that has no meaning.
    """

    bits: int
    group_size: int = 0
    outlier_divisor: int = 0
    values: Values = "int"
    scale_format: ScaleFormat = "bf16"
    asymmetric: bool = False
    prescaled: bool = False
    rotation: Block = 0
    exponent: float = EXPONENT
    fitted: bool = False

    def __post_init__(self) -> None:
        try:
            layout = self._layout(features=1, outliers=0)
        except ValueError as error:
            raise ValueError(f"wire format: {error}") from error
        if self.outlier_divisor < 0 or (self.outlier_divisor and not layout.has_codes):
            raise ValueError(
                f"wire format: outlier_divisor is {self.outlier_divisor} with {self.bits} bits; allowed: 0, or with "
                "2 to 8 bits a positive number"
            )
        if self.fitted and (self.group_size or self.asymmetric or self.values != "int" or not layout.has_codes):
            raise ValueError(
                "wire format: fitted goes with static scales of symmetric integers, so without group_size and "
                f"asymmetric, not with group_size {self.group_size}, asymmetric={self.asymmetric}, values "
                f"{self.values!r} and {self.bits} bits"
            )
        if not 0 < self.exponent <= 1 or (self.exponent != EXPONENT and not self.prescaled):
            raise ValueError(
                f"wire format: exponent is {self.exponent:g} with prescaled={self.prescaled}; allowed: above 0 up to "
                f"1, and {EXPONENT:g} where features are not prescaled"
            )
        if self.rotation:
            check_block(self.rotation)
            if not layout.group_size:
                raise ValueError(
                    f"wire format: rotation is {self.rotation!r} with group_size 0 and {self.bits} bits; allowed: with "
                    "a group_size, for calibrated scales of features say nothing of features that are mixed"
                )

    @property
    def is_static(self) -> bool:
        """True where the codes need calibrated scales."""
        return self._layout(1, 0).needs_static

    @property
    def has_static_minimum(self) -> bool:
        """True where the codes need calibrated minimums."""
        return self._layout(1, 0).needs_minimum

    @property
    def largest_code(self) -> float:
        """What the largest magnitude of a static range stands for; of asymmetric codes, its width, in steps."""
        if self.values != "int":
            return {"e4m3": 448.0, "e2m1": 6.0, "lm": 1.0, "nf4": 1.0, "tc": 1.0}[self.values]
        return 2.0**self.bits - 2 if self.asymmetric else 2.0 ** (self.bits - 1) - 1

    def outlier_count(self, hidden: int) -> int:
        return hidden // self.outlier_divisor if self.outlier_divisor else 0

    def packet_layout(self, hidden: int) -> PacketLayout:
        """Where the sections of one row of `hidden` values lie.

        Rotated, a row is that of `hidden` mixed features, outliers' places included, and of its outliers behind them.
        """
        outliers = self.outlier_count(hidden)
        if self.rotation:
            return replace(self._layout(hidden + outliers, outliers), prescaled=False)  # factors come before
        return self._layout(hidden, outliers)

    def bits_per_value(self, hidden: int) -> float:
        """Nominal bits: codes, scales, minimums and outliers, without the padding of a row."""
        layout = self.packet_layout(hidden)
        return round(layout.nominal_bits_per_value * layout.features) / hidden  # whole bits of a row

    def wire_bits_per_value(self, hidden: int) -> float:
        """Bits that really travel: rows are whole multiples of 2 bytes. The same for any token count."""
        return 8 * self.packet_layout(hidden).row_nbytes / hidden

    def _layout(self, features: int, outliers: int) -> PacketLayout:
        return PacketLayout(
            features=features,
            bits=self.bits,
            # the size of the body itself: the reference pads rows to whole groups
            group_size=max(1, features - outliers) if self.group_size == WHOLE_ROW else self.group_size,
            outliers=outliers,
            values=self.values,
            scale_format=self.scale_format,
            asymmetric=self.asymmetric,
            prescaled=self.prescaled,
        )
