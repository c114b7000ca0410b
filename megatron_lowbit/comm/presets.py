"""PRESETS: schemes by what they are for. They need a calibration, and nothing to be searched."""

from __future__ import annotations

#: `balanced` sends at most 4.25 bits a value, `small` at most 3.25, in the mean over both stages, for every width that
#: is a multiple of 64 from 640 on, and 512 and 576 where no norm follows the sums. (Rows of other widths are padded and
#: groups do not fill them: up to 0.06 bits more.) The portable ones need partial sums alone, so that other engines can
#: use them; the others also foretell partial sums from the block's input, and make up at the next sync point for what
#: encoders missed. Chosen by KL on SmolLM2 135M and Gemma 3 270M (benchmarks/README.md), where code books beat
#: integers, groups of 40 with one-byte scales groups of 64 with 16-bit ones, and 0.6 as power of smoothing 0.5 and 0.7.
PRESETS: dict[str, str] = {
    "balanced": "lm4-g40-e4m3-prescaled0.6:predict=64:loop",
    "small": "lm3-g40-e4m3-prescaled0.6:predict=64:loop",
    "balanced-portable": "lm4-g40-e4m3-prescaled0.6",
    "small-portable": "lm3-g40-e4m3-prescaled0.6",
}
