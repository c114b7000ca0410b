"""Draws how much faster than torch's all-reduce a message is, against its size, from rows of `bench all-reduce --json`.

    python benchmarks/plot_speedups.py OUT.png benchmarks/results/*all-reduce*.json

One panel a link, one line a TP size and scheme; the band is the 95 % interval of the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from megatron_lowbit.files import replacing

SCHEME = "int4-outlier"
CEILING = 16 / 4.1875  # of the wire, H a multiple of 64
COLOURS = {2: "#c0392b", 3: "#8e44ad", 4: "#2e86ab", 8: "#1e8449"}


def read(paths: list[Path]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Rows by link and TP size."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        data = json.loads(path.read_text())
        link = data["conditions"].get("link") or "no limit"
        for row in data["rows"]:
            found[link][row["tp"]].append(row)
    return found


def draw(axes: Axes, rows: list[dict[str, Any]], scheme: str, label: str, colour: str, dashed: bool) -> None:
    """One line; sizes in KiB of the message as 16-bit values."""
    own = sorted((row for row in rows if row["scheme"] == scheme), key=lambda row: row["tokens"])
    if not own:
        return
    sizes = [2 * row["tokens"] * row["hidden"] / 1024 for row in own]
    axes.plot(
        sizes, [row["ratio_to_torch_all_reduce"] for row in own], "--" if dashed else "-", marker="o", markersize=4,
        color=colour, label=label, alpha=0.6 if dashed else 1.0,
    )  # fmt: skip
    axes.fill_between(
        sizes, [row["ratio_low"] for row in own], [row["ratio_high"] for row in own], color=colour, alpha=0.12
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw speed-ups over torch's all-reduce against message size.")
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS.json")
    args = parser.parse_args()
    links = read(args.rows)
    order = sorted(links, key=lambda link: (link == "no limit", link.endswith("gbit"), len(link), link))
    figure, panels = pyplot.subplots(
        1, len(order), figsize=(4.2 * len(order), 4.4), dpi=130, sharey=True, squeeze=False
    )
    for axes, link in zip(panels[0], order, strict=True):
        for tp, rows in sorted(links[link].items()):
            colour = COLOURS.get(tp, "#555555")
            draw(axes, rows, f"{SCHEME}, policy", f"TP={tp}, policy", colour, dashed=False)
            draw(axes, rows, SCHEME, f"TP={tp}, two-stage forced", colour, dashed=True)
        axes.axhline(1.0, color="#555555", linewidth=1)
        axes.axhline(CEILING, color="#777777", linewidth=1, linestyle=":", label="ceiling of the bytes, 3.82x")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.set_xticks([8, 32, 128, 512, 2048, 8192], ["8", "32", "128", "512", "2 Mi", "8 Mi"])
        axes.set_title(f"link: {link}", fontsize=10)
        axes.set_xlabel("message as 16-bit values, KiB (Mi: MiB)")
        axes.grid(True, alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0][0].set_ylabel(f"{SCHEME}: times as fast as torch's all-reduce")
    panels[0][-1].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    with replacing(args.out) as beside:
        figure.savefig(beside, format="png")


if __name__ == "__main__":
    main()
