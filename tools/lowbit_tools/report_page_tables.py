"""Tables of a report page, and how its numbers read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from megatron_lowbit.quality_report_verdict import percent

Row = Mapping[str, Any]
#: HTML of a row's cell.
Cell = Callable[[Row], str]


def table(rows: Sequence[Row], columns: Mapping[str, Cell], kind: str = "") -> str:
    """An HTML table; `columns` maps each heading to how a row's cell reads. Scrolls by itself where it is wide."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell(row)}</td>' for cell in columns.values())}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def folded(summary: str, body: str) -> str:
    """Shown on demand; printed pages show what is open."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def note(text: str) -> str:
    """Definitions below what they define."""
    return f'<p class="note">{escape(text)}</p>'


def cell_scheme(name: str) -> str:
    return f"<code>{escape(name)}</code>"


def number(value: float | None) -> str:
    """Two significant digits, without a power of ten where it can be read without."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:.2g}" if abs(value) < 1e-4 else f"{value:.{max(0, 1 - _magnitude(value))}f}"


def within(row: Row, key: str) -> str:
    """A number that is never negative, with its interval below it, as HTML."""
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    return number(row[key]) + ("" if low is None else _interval(number(max(low, 0.0)), number(high)))


def within_percent(row: Row, key: str, sign: bool) -> str:
    """A share with its interval; one that has no sign stays within 0 and 1."""
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    if low is None:
        return percent(row[key], sign)
    if not sign:
        low, high = max(low, 0.0), min(high, 1.0)
    return percent(row[key], sign) + _interval(percent(low, sign), percent(high, sign))


def _interval(low: str, high: str) -> str:
    return f'<span class="interval">{low} to {high}</span>'


def _magnitude(value: float) -> int:
    """Power of ten of the first digit, once rounded to two."""
    return int(f"{value:.1e}".split("e")[1])
