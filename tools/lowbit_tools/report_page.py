"""report_page: the rows of a quality report as one HTML page that needs nothing else, neither scripts nor a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lowbit_tools import report_page_depth as depth
from lowbit_tools import report_page_sections as sections
from lowbit_tools.report_page_parts import Parts
from lowbit_tools.report_page_style import STYLE
from lowbit_tools.report_page_tables import Row, cell_scheme, number
from megatron_lowbit.quality_report_verdict import DECODE_FACTOR, GRADES, percent

TONES = dict(zip((grade.name for grade in GRADES), ("good", "good", "fair", "bad", "bad"), strict=True))
#: Order, heading and maker of the sections; each gives an empty text where the rows have nothing for it.
SECTIONS = (
    ("quality", "Quality in numbers", sections.quality),
    ("bits", "Quality against bits", sections.bits),
    ("positions", "By position in the window", sections.positions),
    ("lengths", "By length of the context", sections.lengths),
    ("decode", "Token by token", sections.decode),
    ("layers", "Error by layer", depth.layers),
    ("saturation", "Values beyond their static range", depth.saturation),
    ("outliers", "Where the outliers are", depth.outliers),
    ("overlaps", "How far ranks, layers and tokens agree on outliers", depth.overlaps),
    ("generation", "Long greedy texts", sections.generation),
)


def report_page(facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The whole page, UTF-8 text, of a report's conditions and rows as they stand in its JSON file."""
    parts = Parts(facts, rows)
    made = [(key, heading, make(parts)) for key, heading, make in SECTIONS]
    made = [(key, heading, body) for key, heading, body in made if body]
    title = f"Quality of low-bit communication: {facts['model']}"
    links = "".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _ in made)
    bodies = "".join(f'<h2 id="{key}">{escape(heading)}</h2>{body}' for key, heading, body in made)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        f"<h1>{escape(title)}</h1>{_lead(facts)}{_verdicts(parts)}<nav>{links}</nav>\n"
        f"{bodies}\n{_conditions(facts)}</main></body></html>\n"
    )


def _lead(facts: Mapping[str, Any]) -> str:
    ranks = f"{facts['tp']} {'virtual ' if facts['virtual_ranks'] else ''}ranks"
    return (
        f'<p class="lead-in">{escape(str(facts["dtype"]))}, {ranks}; {facts["windows"]} windows of {facts["length"]} '
        f"tokens of {escape(str(facts['text']))}; {escape(facts['date'][:10])}, commit "
        f"{escape(str(facts['commit']))}. Every scheme is compared with <code>exact</code>, an unrounded FP32 sum over "
        "ranks, of the same weights, on the same tokens, at every message size.</p>"
    )


def _verdicts(parts: Parts) -> str:
    quality = {row["scheme"]: row for row in parts.of("quality")}
    cards = []
    for row in parts.of("verdict"):
        bits, kl = (quality[row["scheme"]][key] for key in ("mean_bits_per_value", "kl"))
        fewer = f"1/{16 / bits:.1f} of the bytes of 16 bits, " if bits < 15.9 else ""
        figures = f"{bits:.2f} bits a value, {fewer}KL {number(kl)}"
        cards.append(
            f'<article class="verdict"><header>{cell_scheme(row["scheme"])}'
            f'<span class="grade {TONES[row["grade"]]}">{escape(row["grade"])}</span>'
            f'<span class="figures">{figures}</span></header><p>{escape(row["text"])}</p></article>'
        )
    if not cards:
        return ""
    limits = "; ".join(f"“{grade.name}” up to {grade.kl:g} and {percent(grade.perplexity)}" for grade in GRADES[:-1])
    return (
        f'<div class="verdicts">{"".join(cards)}</div><details><summary>How grades are given</summary>'
        '<p class="note">By KL (nats a token, mean over windows) and by the rise of perplexity, where its 95 % '
        "interval leaves out no change (it is the noisier of the two); the worse of both counts: "
        f"{limits}; “{GRADES[-1].name}” beyond. The interval's unfavourable end is graded likewise. Decoding is "
        f"mentioned where even the lower end of its KL is {DECODE_FACTOR:g} times that of prefill. Grades are about "
        "this model and this text: small models suffer far more from few bits than large ones, and KL on prose says "
        "little about arithmetic or long chains of reasoning.</p></details>"
    )


def _conditions(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(key.replace('_', ' '))}</th><td>{escape(_shown(value))}</td></tr>"
        for key, value in facts.items()
        if value is not None
    )
    return f'<h2 id="conditions">Conditions</h2><div class="scroll"><table class="facts">{rows}</table></div>'


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
