"""PRESETS: schemes by what they are for. They need a calibration, and nothing to be searched."""

from __future__ import annotations

#: `balanced` sends at most 4.25 bits a value, `small` at most 3.25, in the mean over both stages and for every model of
#: 512 features or more. The portable ones need partial sums alone, so that other engines can use them; the others also
#: foretell partial sums from the block's input, and make up at the next sync point for what encoders missed. Chosen by
#: KL on SmolLM2 135M (benchmarks/README.md); 16-bit scales would pass the limits where groups do not fill a row.
PRESETS: dict[str, str] = {
    "balanced": "int4-g64-e4m3-prescaled:predict:loop",
    "small": "int3-g64-e4m3-prescaled:predict:loop",
    "balanced-portable": "int4-g64-e4m3-prescaled",
    "small-portable": "int3-g64-e4m3-prescaled",
}
