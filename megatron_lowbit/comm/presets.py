"""PRESETS: schemes by what they are for. They need a calibration, and nothing to be searched."""

from __future__ import annotations

#: How values are scaled, by presets and in searches.
SCALED = "e4m3-prescaled0.6"
_GROUPED = f"g64-{SCALED}"
#: What the last sync point has in presets of 4 bits.
FINE_LAST = f"int7-{_GROUPED}"
_FINE_LAST = f"last={FINE_LAST}"
_FINE_ENDS = f"first=tc4-{_GROUPED}:last=int5-{_GROUPED}"

#: `balanced` and `fine` send at most 4.25 bits a value, `small` at most 3.25, in the mean over both stages and all sync
#: points of a model of 18 layers or more, for widths that are a multiple of 128 from 640 on. (Rows of other widths are
#: padded and groups do not fill them: up to 0.1 bits more.) The portable ones need partial sums alone, so that other
#: engines can use them; the others also foretell partial sums from the block's input, and make up at the next sync
#: point for what encoders missed. No point comes after the last, where each miss goes right into the logits: it gets
#: more bits. At 3 bits the first gets one more as well, for all else is built on it. `fine` and `small` are
#: trellis-coded: that takes a quarter to a third of the KL away, for time that slow links or fast processors leave;
#: `balanced` has a predictor of rank 16, which leaves a fifth more than one of rank 64 and takes half its time. Chosen
#: by KL on SmolLM2 135M and Gemma 3 270M (benchmarks/README.md), where code books beat integers, one-byte scales 16-bit
#: ones, 0.6 as power of smoothing 0.5 and 0.7, and a finer last point smaller groups.
PRESETS: dict[str, str] = {
    "balanced": f"lm4-{_GROUPED}:predict=16:loop:{_FINE_LAST}",
    "fine": f"tc4-{_GROUPED}:predict=64:loop:{_FINE_LAST}",
    "small": f"tc3-{_GROUPED}:predict=64:loop:{_FINE_ENDS}",
    "balanced-portable": f"lm4-{_GROUPED}:{_FINE_LAST}",
    "small-portable": f"tc3-{_GROUPED}:{_FINE_ENDS}",
}
