"""Sections of a report page about what happens inside the model: errors by layer, clamped values, outliers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape

from lowbit_tools.report_page_charts import Axis, Point, Series, colour_bar, heat_map, legend, line_chart
from lowbit_tools.report_page_parts import KINDS, Parts
from lowbit_tools.report_page_tables import Row, cell_scheme, note, number, table
from megatron_lowbit.quality_report_outliers import OVERLAPS


def layers(parts: Parts) -> str:
    rows = parts.of("layers")
    if not rows:
        return ""
    html = [parts.legend("layers")]
    for kind, where in KINDS.items():
        html.append(f"<h3>Error of the sum {escape(where)}</h3>")
        html.append(_layer_chart(parts, kind, "error", "relative squared error"))
    html.append("<h3>Error that has gathered in the residual, behind each feed-forward block</h3>")
    html.append(_layer_chart(parts, "down_proj", "drift", "relative squared error"))
    staged = [row for row in rows if row["reduce_error"] is not None and row["error"] > 0]
    if staged:
        columns = {
            "scheme": lambda row: cell_scheme(row["scheme"]),
            "behind": lambda row: row["kind"],
            "first stage alone": lambda row: number(row["reduce_error"]),
            "both stages": lambda row: number(row["error"]),
        }
        html.append("<h3>The two stages</h3>" + table(_by_stage(parts, staged), columns))
        html.append(
            note(
                "Means over layers, of schemes whose stages can be told apart: not those that predict or close a loop."
            )
        )
    windows, length = parts.facts["layer_windows"], parts.facts["length"]
    html.append(
        note(
            f"Mean over the tokens of {windows} window(s) of {length}, each token weighing alike, in the scheme's own "
            "pass: what a sync point adds to the residual, less what the unrounded sum of the same partial sums would "
            "have added, squared and summed over features, over the square of the latter. Schemes that close a loop "
            "deliberately add what earlier sync points missed, which counts as error here and pays in the third "
            "picture: there the errors of all sync points so far are added up before they are squared, over the "
            "residual's square."
        )
    )
    return "".join(html)


def saturation(parts: Parts) -> str:
    rows = [
        row for row in parts.of("layers") if row["saturated_reduce"] is not None or row["saturated_gather"] is not None
    ]
    if not rows:
        return ""
    html = [legend([(name, parts.styles[name]) for name in dict.fromkeys(row["scheme"] for row in rows)])]
    for stage, what in (
        ("reduce", "Partial sums on their way to a token's owner"),
        ("gather", "Sums on their way back"),
    ):
        key = f"saturated_{stage}"
        if any(row[key] for row in rows):
            for kind, where in KINDS.items():
                html.append(f"<h3>{what}, {escape(where)}</h3>")
                html.append(_layer_chart(parts, kind, key, "share of values clamped", height=220))
    html.append(note("Values that are clamped because they lie beyond the static range that calibration gave them."))
    return "".join(html)


def outliers(parts: Parts) -> str:
    rows = parts.of("outliers")
    if not rows:
        return ""
    # beside the median of its sync point, or the few layers with wide sums would be all there is to see
    relative = [[value - statistics.median(row["log10_ranges"]) for value in row["log10_ranges"]] for row in rows]
    ordered = sorted(value for row in relative for value in row)
    low, high = ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 2000]
    html = [
        note(
            "Calibrated ranges: twice the largest magnitude of a feature, averaged over sequences, summed over ranks; "
            "here over the median range of their sync point. Bright columns are features that are wide in many layers; "
            "the paper sends the widest 1/64 of each sync point in BF16."
        ),
        colour_bar("range of a feature over the median one, log scale", low, high),
    ]
    for kind, where in KINDS.items():
        of_kind = [row for row in rows if row["kind"] == kind]
        if of_kind:
            html.append(f"<h3>{escape(where.capitalize())}</h3>")
            values = [found for row, found in zip(rows, relative, strict=True) if row["kind"] == kind]
            width = of_kind[0]["features_per_column"]
            features = "feature" if width == 1 else f"feature (widest of {width} neighbours)"
            html.append(heat_map(f"Outliers {where}", values, width, low, high, "layer", features))
    html.append(_persistent(rows))
    return "".join(html)


def overlaps(parts: Parts) -> str:
    rows = parts.of("overlap")
    if not rows:
        return ""
    columns = {
        "compared": lambda row: escape(OVERLAPS[row["what"]]),
        "share": lambda row: f"{row['value']:.2f}",
        "by chance": lambda row: "–" if row["chance"] is None else f"{row['chance']:.3f}",
    }
    return table(rows, columns, "words") + note(
        "Each set holds the widest 1/64 of the features; shares are of features in common, mean over sync points. "
        "Energy: squares of a rank's partial sums, of the median token."
    )


def _layer_chart(parts: Parts, kind: str, key: str, label: str, height: int = 270) -> str:
    series = []
    for name in parts.shown("layers"):
        found = [row for row in parts.of("layers", scheme=name, kind=kind) if row[key] is not None]
        points = [
            Point(row["layer"], row[key], note=f"{name}, layer {row['layer']}: {number(row[key])}") for row in found
        ]
        series.append(Series(name, parts.styles[name], points))
    return line_chart(f"{label}, {KINDS[kind]}", series, Axis("layer"), Axis(f"{label}, log", log=True), height)


def _by_stage(parts: Parts, staged: Sequence[Row]) -> list[Row]:
    means: list[Row] = []
    for name in parts.shown("layers"):
        for kind in KINDS:
            found = [row for row in staged if row["scheme"] == name and row["kind"] == kind]
            if found:
                sums = {key: math.fsum(row[key] for row in found) / len(found) for key in ("reduce_error", "error")}
                means.append({"scheme": name, "kind": kind} | sums)
    return means


def _persistent(rows: Sequence[Row]) -> str:
    """Features that are among the widest at most sync points."""
    counts: dict[int, int] = {}
    for row in rows:
        for feature in row["outliers"]:
            counts[feature] = counts.get(feature, 0) + 1
    often = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
    named = ", ".join(f"{feature} ({count})" for feature, count in often)
    return note(f"Features most often among the widest 1/64, of {len(rows)} sync points: {named}.")
