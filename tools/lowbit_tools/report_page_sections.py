"""Sections of a report page about predictions: each takes the rows it is about and gives HTML, nothing where there are
none."""

from __future__ import annotations

from collections.abc import Sequence

from lowbit_tools.report_page_charts import Axis, Point, Series, line_chart, point_chart
from lowbit_tools.report_page_parts import KL_AXIS, Parts
from lowbit_tools.report_page_tables import Cell, Row, cell_scheme, folded, note, number, table, within, within_percent
from megatron_lowbit.quality_report_verdict import percent


def quality(parts: Parts) -> str:
    rows = parts.of("quality")
    if not rows:
        return ""
    columns: dict[str, Cell] = {
        "scheme": lambda row: cell_scheme(row["scheme"]),
        "bits a value": _bits,
        "bytes a token and rank": lambda row: f"{row['sent_nbytes_per_token_per_rank']:,.0f}",
        "perplexity": lambda row: f"{row['perplexity']:,.2f}",
        "change of perplexity": lambda row: within_percent(row, "perplexity_change", sign=True),
        "KL, nats a token": lambda row: within(row, "kl"),
        "same likeliest token": lambda row: within_percent(row, "top1_agreement", sign=False),
    }
    if any(row["non_finite"] for row in rows):
        columns["NaN and Inf"] = lambda row: f"{row['non_finite']:,}"
    return table(rows, columns) + note(
        "In small print: 95 % confidence intervals (Student's t over windows); that of perplexity is paired, from the "
        "difference to exact on each window. Bits are those on the wire, scales and padding included "
        "(reduce / gather, where the stages differ). Bytes: what a rank sends for one token at all sync points. KL: of "
        "the exact prediction from the scheme's, over the whole vocabulary, mean over positions. Same likeliest token: "
        "share of positions whose best token is that of exact."
    )


def bits(parts: Parts) -> str:
    rows = [row for row in parts.of("quality") if row["scheme"] != "exact"]
    if not rows:
        return ""
    series = [
        Series(
            row["scheme"],
            parts.styles[row["scheme"]],
            [Point(row["mean_bits_per_value"], row["kl"], row["kl_low"], row["kl_high"], _note(row))],
        )
        for row in rows
    ]
    widest = max(row["mean_bits_per_value"] for row in rows)
    x_axis = Axis("bits on the wire for each value, mean of both stages", start=2.0, stop=max(widest + 1.0, 9.0))
    return point_chart("Quality against bits", series, x_axis, Axis(KL_AXIS, log=True), height=380) + note(
        "Lower and further left is better. Whiskers: 95 % confidence intervals."
    )


def positions(parts: Parts) -> str:
    rows = parts.of("position")
    if not rows:
        return ""
    ranges = sorted({(row["first"], row["last"]) for row in rows})
    places = {found: index for index, found in enumerate(ranges)}
    series = [
        _series(parts, name, [(places[row["first"], row["last"]], row) for row in parts.of("position", scheme=name)])
        for name in parts.shown("position")
    ]
    ticks = [(index, f"{first}–{last}") for (first, last), index in places.items()]
    chart = line_chart(
        "KL by position", series, Axis("position in the window (tokens before it)", ticks=ticks),
        Axis(KL_AXIS, log=True),
    )  # fmt: skip
    columns = {
        "scheme": lambda row: cell_scheme(row["scheme"]),
        "positions": lambda row: f"{row['first']}–{row['last']}",
        "KL": lambda row: within(row, "kl"),
        "change of perplexity": lambda row: within_percent(row, "perplexity_change", sign=True),
        "same likeliest token": lambda row: within_percent(row, "top1_agreement", sign=False),
    }
    shown = [row for row in rows if row["scheme"] != "exact"]
    return parts.legend("position") + chart + folded("The same as a table", table(shown, columns))


def lengths(parts: Parts) -> str:
    rows = parts.of("length")
    if len({row["length"] for row in rows}) < 2:
        return ""
    series = [
        _series(parts, name, sorted((row["length"], row) for row in parts.of("length", scheme=name)))
        for name in parts.shown("length")
    ]
    ticks = [(length, f"{length:,}") for length in sorted({row["length"] for row in rows})]
    chart = line_chart(
        "KL by length of the context", series, Axis("tokens a window, log scale", log=True, ticks=ticks),
        Axis(KL_AXIS, log=True),
    )  # fmt: skip
    columns = {
        "scheme": lambda row: cell_scheme(row["scheme"]),
        "tokens a window": lambda row: f"{row['length']:,}",
        "windows": lambda row: str(row["windows"]),
        "KL": lambda row: within(row, "kl"),
        "change of perplexity": lambda row: within_percent(row, "perplexity_change", sign=True),
        "same likeliest token": lambda row: within_percent(row, "top1_agreement", sign=False),
    }
    shown = sorted((row for row in rows if row["scheme"] != "exact"), key=lambda row: parts.styles[row["scheme"]])
    return (
        parts.legend("length")
        + chart
        + note("Mean over all positions of windows of this length; about as many tokens for each length.")
        + folded("The same as a table", table(shown, columns))
    )


def decode(parts: Parts) -> str:
    rows = [row for row in parts.of("decode") if row["scheme"] != "exact"]
    if not rows:
        return ""
    columns = {
        "scheme": lambda row: cell_scheme(row["scheme"]),
        "sequences at once": lambda row: str(row["batch"]),
        "scored tokens": lambda row: f"{row['tokens']:,}",
        "KL, decoded": lambda row: within(row, "kl"),
        "KL, prefilled": lambda row: number(row["prefill_kl"]),
        "same likeliest token, decoded": lambda row: within_percent(row, "top1_agreement", sign=False),
        "prefilled": lambda row: percent(row["prefill_top1_agreement"], sign=False),
    }
    shown = sorted(rows, key=lambda row: (row["batch"], parts.styles[row["scheme"]]))
    first = min(row["first"] for row in rows)
    return table(shown, columns) + note(
        f"The text's own tokens from position {first} on, fed one by one over a KV cache that the scheme itself "
        "filled, so that messages have as many rows as sequences run at once; beside it the same positions of the same "
        "windows, each window in one pass. exact is decoded likewise. The scheme is used at every size; generate by "
        "default sends such small messages exactly or in one stage, which is better than this."
    )


def generation(parts: Parts) -> str:
    rows = parts.of("generation")
    if not rows:
        return ""
    steps, prompts = rows[0]["new_tokens"], rows[0]["prompts"]
    series = []
    for row in rows:
        ends = sorted(at for at in row["diverged_at"] if at is not None)
        same = [(tokens, sum(at >= tokens for at in ends) + prompts - len(ends)) for tokens in range(steps + 1)]
        marks = {0, steps} | {tokens for tokens in range(0, steps + 1, max(1, steps // 8))}
        points = [
            Point(tokens, 100 * left / prompts, note=f"{row['scheme']}: {left} of {prompts} after {tokens} tokens")
            for tokens, left in same
            if tokens in marks
        ]
        series.append(Series(row["scheme"], parts.styles[row["scheme"]], points))
    chart = line_chart(
        "Texts that still equal the exact ones", series, Axis("new tokens"),
        Axis("texts that equal the exact ones so far (%)", start=0.0, stop=100.0),
    )  # fmt: skip
    columns = {
        "scheme": lambda row: cell_scheme(row["scheme"]),
        "texts": lambda row: str(row["prompts"]),
        "median token of the first difference": _nth,
        "the same to the end": lambda row: percent(row["same_to_the_end"], sign=False),
        "repeated 4-grams": lambda row: percent(row["repetition"], sign=False),
        "of exact": lambda row: percent(row["exact_repetition"], sign=False),
    }
    return (
        parts.legend("generation")
        + chart
        + table(rows, columns)
        + note(
            f"Greedy continuations of {prompts} pieces of {parts.facts['prompt_tokens']} tokens of the text, {steps} "
            "new tokens each, the scheme at every size. A greedy text changes for good at its first different token, "
            "which need not make it worse: two words can be as likely. Repeated 4-grams: share of runs of four "
            "tokens that stood before in the same continuation."
        )
    )


def _series(parts: Parts, name: str, placed: Sequence[tuple[float, Row]]) -> Series:
    points = [Point(x, row["kl"], row["kl_low"], row["kl_high"], _note(row)) for x, row in placed]
    return Series(name, parts.styles[name], points)


def _note(row: Row) -> str:
    bounds = "" if row["kl_low"] is None else f", {number(max(row['kl_low'], 0.0))} to {number(row['kl_high'])}"
    return f"{row['scheme']}: KL {number(row['kl'])}{bounds}"


def _bits(row: Row) -> str:
    gather = row["gather_bits_per_value"]
    if gather == row["reduce_bits_per_value"]:
        return f"{gather:.2f}"
    return f"{row['reduce_bits_per_value']:.2f} / {'–' if gather is None else f'{gather:.2f}'}"


def _nth(row: Row) -> str:
    at = row["median_diverged_at"]
    return f"beyond {row['new_tokens']}" if at is None else f"{at + 1}"
