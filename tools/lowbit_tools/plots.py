"""Pictures of quality against bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from megatron_lowbit.files import replacing

_LABEL_STEP = 1.35  # a line of text, on the logarithmic axis
_COLOURS = {"int4-outlier": "#c0392b", "int4": "#7f8c8d", "int4-random": "#b08b3e", "bf16": "#2c3e50"}


def quality_against_bits(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], path: Path) -> None:
    """KL to the exact sum (log scale) over bits a value (mean of the stages), one point a scheme, as PNG."""
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=140)
    shown = sorted((row for row in rows if row["kl_mean"] > 0), key=lambda row: (row["kl_mean"], row["scheme"]))
    label_y = 0.0
    for row in shown:
        stages = [row["reduce_bits_per_value"], row["gather_bits_per_value"]]
        bits = [value for value in stages if value is not None]
        x, y = sum(bits) / len(bits), row["kl_mean"]
        colour = _COLOURS.get(row["scheme"].split(":")[0], "#2e86ab")
        axes.errorbar(x, y, yerr=min(row["kl_stderr"], 0.9 * y), fmt="o", color=colour, capsize=3, markersize=7)
        label = f"{row['scheme']}, {100 * (row['perplexity_ratio'] - 1):+.1f} % perplexity"
        rightmost = x > 12
        label_y = max(y, _LABEL_STEP * label_y)  # points close to each other: labels one above the other
        axes.annotate(
            label, (x, label_y), textcoords="offset points", xytext=(-9 if rightmost else 12, 0), fontsize=8,
            ha="right" if rightmost else "left", va="center", color=colour,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlim(3, 17)
    axes.set_xlabel("bits on the wire per communicated value, mean of both stages")
    axes.set_ylabel("KL to the exact sum (nats/token), lower is better")
    ranks = f"{facts['tp']} {'virtual ' if facts['virtual_ranks'] else ''}ranks"
    axes.set_title(
        f"{Path(facts['model']).name}, {facts['dtype']}, {ranks}, {facts['windows']} x {facts['length']} tokens",
        fontsize=10,
    )
    axes.grid(True, which="both", alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    try:
        with replacing(path) as beside:
            figure.savefig(beside, format="png")
    finally:
        pyplot.close(figure)
