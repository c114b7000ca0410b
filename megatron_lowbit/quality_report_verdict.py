"""What measured numbers mean in plain words, by thresholds that are stated with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Grade:
    """A scheme has the best grade whose limits it keeps: KL in nats a token; loss of perplexity as a share, where it is
    shown (its interval leaves out no change), since it is the noisier of the two."""

    name: str
    meaning: str
    kl: float
    perplexity: float


GRADES = (
    Grade("as 16 bits", "as close to the exact sum as 16-bit communication usually is", 0.001, 0.005),
    Grade("hardly noticeable", "differences show in measurements, hardly in use", 0.01, 0.01),
    Grade("small loss", "somewhat weaker answers are to be expected; try it on your task", 0.05, 0.03),
    Grade("clear loss", "weaker answers show in use; for experiments, or where bytes are all that counts", 0.2, 0.1),
    Grade(
        "heavy loss", "another model for practical purposes; do not use it with this model", float("inf"), float("inf")
    ),
)

#: Decoding is mentioned where even the lower end of its KL is so many times that of prefill.
DECODE_FACTOR = 1.25


def verdict_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row a scheme of the `quality` rows: `grade`, `worst_grade` (where the interval's unfavourable ends would put
    it; None where one window tells no spread) and `text`."""
    by_part: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_part.setdefault((row["part"], row.get("scheme", "")), []).append(row)
    quality = {row["scheme"]: row for row in rows if row["part"] == "quality"}
    found = []
    for scheme, row in quality.items():
        shown = is_shown(row)
        grade = grade_of(row["kl"], row["perplexity_change"] if shown else 0.0)
        worst = None
        if row["kl_high"] is not None:
            worst = grade_of(row["kl_high"], row["perplexity_change_high"] if shown else 0.0)
        sentences = [_agreement(row), _perplexity(row), _grading(grade, worst)]
        sentences += _decode(by_part.get(("decode", scheme), []))
        usual = None if scheme == "bf16" else next(iter(by_part.get(("generation", "bf16"), [])), None)
        sentences += _generation(by_part.get(("generation", scheme), []), usual)
        found.append(
            {
                "part": "verdict",
                "scheme": scheme,
                "grade": grade.name,
                "worst_grade": None if worst is None else worst.name,
                "text": " ".join(sentences),
            }
        )
    return found


def grade_of(kl: float, perplexity_change: float) -> Grade:
    """The best grade whose limits both keep; NaN keeps none. A perplexity that falls is no loss."""
    fitting = (grade for grade in GRADES if kl <= grade.kl and perplexity_change <= grade.perplexity)
    return next(fitting, GRADES[-1])


def is_shown(row: Row) -> bool:
    """True where the interval of the change of perplexity leaves out no change."""
    low, high = row["perplexity_change_low"], row["perplexity_change_high"]
    return low is not None and not low <= 0 <= high


def _agreement(row: Row) -> str:
    differ = 100 * (1 - row["top1_agreement"])
    return f"The likeliest next token differs in {_count(differ)} of 100 places."


def _perplexity(row: Row) -> str:
    change, low, high = (row[f"perplexity_change{end}"] for end in ("", "_low", "_high"))
    if low is None:
        return f"Perplexity changes by {percent(change)} (one window: no interval)."
    if not is_shown(row):
        return f"A change of perplexity is not shown ({percent(low)} to {percent(high)})."
    word = "rises" if change > 0 else "falls"
    return f"Perplexity {word} by {percent(abs(change), sign=False)} ({percent(low)} to {percent(high)})."


def _grading(grade: Grade, worst: Grade | None) -> str:
    said = f"{grade.name.capitalize()}: {grade.meaning}."
    if worst is None or worst is grade:
        return said
    return f"{said} The interval reaches into “{worst.name}”: more windows would tell."


def _decode(rows: Sequence[Row]) -> list[str]:
    shown = [row for row in rows if row["kl_low"] is not None and row["kl_low"] > DECODE_FACTOR * row["prefill_kl"] > 0]
    if not shown:
        return []
    worst = max(shown, key=lambda row: row["kl"] / row["prefill_kl"])
    return [
        f"Token by token ({worst['batch']} at once) KL is {worst['kl'] / worst['prefill_kl']:.1f} times that of whole "
        "prompts at the same positions."
    ]


def _generation(rows: Sequence[Row], usual: Row | None) -> list[str]:
    """usual: the row of 16 bits, whose texts part from the exact ones too."""
    beside = ""
    if usual is not None:
        at = usual["median_diverged_at"]
        when = f"after {usual['new_tokens']}" if at is None else f"by token {at + 1}"
        beside = f" (with bf16, {when})"
    sentences = []
    for row in rows:
        at = row["median_diverged_at"]
        if at is None:
            sentences.append(f"At least half of the greedy texts equal the exact ones for {row['new_tokens']} tokens.")
        else:
            sentences.append(f"Half of the greedy texts differ from the exact ones by token {at + 1}{beside}.")
        if row["repetition"] > row["exact_repetition"] + 0.1:
            sentences.append(
                f"They repeat themselves more ({percent(row['repetition'], sign=False)} of 4-grams, exact "
                f"{percent(row['exact_repetition'], sign=False)})."
            )
    return sentences


def _count(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def percent(share: float, sign: bool = True) -> str:
    """As people read it: `+1.2 %`, without needless digits."""
    value = 100 * share
    if abs(value) < 0.005:
        return "0 %"
    digits = 2 if abs(value) < 0.995 else 1 if abs(value) < 99.5 else 0
    return f"{value:{'+' if sign else ''},.{digits}f} %"
