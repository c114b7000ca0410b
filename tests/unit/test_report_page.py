"""The page of a quality report: whole HTML that needs nothing else, with all that its rows say and no more."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from lowbit_tools.report_page import report_page
from lowbit_tools.report_page_charts import Axis, Point, Series, colour_bar, heat_map, line_chart, point_chart
from lowbit_tools.report_page_tables import number
from megatron_lowbit.quality_report_verdict import percent, verdict_rows

ODD = "int4<b>&"  # a scheme file may be called anything
FACTS = {
    "model": "a <model>", "dtype": "bf16", "tp": 4, "virtual_ranks": True, "windows": 3, "length": 64,
    "text": "t&t.txt", "date": "2026-01-02T03:04:05+00:00", "commit": "abc1234", "layer_windows": 1, "prompt_tokens": 8,
    "parts": ["decode"], "calibration_sequences": None,
}  # fmt: skip
VOID = {"meta", "br", "line", "circle", "path", "image", "polyline"}


def bounded(**values: float) -> dict[str, float]:
    return {
        key + end: value * by for key, value in values.items() for end, by in (("", 1), ("_low", 0.9), ("_high", 1.1))
    }


def sample_rows() -> list[dict]:
    rows: list[dict] = []
    for scheme, kl, bits in ((ODD, 0.123, 4.25), ("bf16", 0.0003, 16.0), ("exact", 0.0, 32.0)):
        scores = bounded(kl=kl, perplexity_change=kl / 2, top1_agreement=0.9) | {"windows": 3, "tokens": 189}
        stages = {"reduce_bits_per_value": bits, "gather_bits_per_value": bits, "mean_bits_per_value": bits}
        more = {"sent_nbytes_per_token_per_rank": 12345.0, "perplexity": 17.5, "non_finite": 0}
        rows.append({"part": "quality", "scheme": scheme} | stages | more | scores)
        for first, last in ((0, 15), (16, 62)):
            rows.append({"part": "position", "scheme": scheme, "first": first, "last": last} | scores)
        rows += [{"part": "length", "scheme": scheme, "length": length} | scores for length in (32, 64)]
        beside = {"batch": 32, "first": 10, "last": 11, "prefill_kl": kl, "prefill_top1_agreement": 0.91}
        rows.append({"part": "decode", "scheme": scheme} | beside | scores)
        for layer in range(2):
            for kind in ("o_proj", "down_proj"):
                errors = {"error": kl, "reduce_error": kl / 2, "drift": kl / 3, "tokens": 64}
                clamped = {"saturated_reduce": None if scheme == "exact" else 0.01, "saturated_gather": None}
                at = {"part": "layers", "scheme": scheme, "sync_point": f"{layer}{kind}", "layer": layer, "kind": kind}
                rows.append(at | errors | clamped)
        if scheme == "exact":
            continue
        texts = {"prompts": 3, "new_tokens": 9, "diverged_at": [None, 4, 7], "median_diverged_at": 7}
        shares = {"same_to_the_end": 1 / 3, "repetition": 0.2, "exact_repetition": 0.1}
        rows.append({"part": "generation", "scheme": scheme} | texts | shares)
    for layer in range(2):
        for kind in ("o_proj", "down_proj"):
            ranges = {"features_per_column": 2, "log10_ranges": [0.1 * layer, 2.0, 0.3], "outliers": [3]}
            rows.append({"part": "outliers", "sync_point": f"{layer}{kind}", "layer": layer, "kind": kind} | ranges)
    rows.append({"part": "overlap", "what": "two_ranks", "value": 0.26, "chance": 0.016})
    return [*verdict_rows(rows), *rows]


class Reader(HTMLParser):
    """Sees that tags close, and what lies outside the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.outside: list[str] = []
        self.ids: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            local = value is None or value.startswith(("#", "data:image/png;base64,"))
            if tag == "script" or name.startswith("on") or (name in ("href", "src", "xlink:href") and not local):
                self.outside.append(f"{tag} {name}={value}")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_else():
    page = report_page(FACTS, sample_rows())
    seen = Reader(page)
    assert not seen.open and not seen.outside
    assert "url(" not in page and "@import" not in page
    keys = ["quality", "bits", "positions", "lengths", "decode", "layers", "saturation", "outliers", "overlaps"]
    assert seen.ids == [*keys, "generation", "conditions"]
    assert set(re.findall(r'href="#(\w+)"', page)) == set(seen.ids) - {"conditions"}
    assert "prefers-color-scheme: dark" in page


def test_names_are_text_not_markup():
    page = report_page(FACTS, sample_rows())
    assert "<b>" not in page and "<model>" not in page
    text = " ".join(Reader(page).text)
    assert ODD in text and "a <model>" in text and "t&t.txt" in text


def test_numbers_of_the_rows_are_on_the_page():
    text = " ".join(Reader(report_page(FACTS, sample_rows())).text)
    words = ["differs in 10 of 100 places", "clear loss", "4.25 bits a value", "abc1234"]
    for shown in (*words, "0.12", "0.11 to 0.14", "12,345", "0.26", percent(0.123 / 2)):
        assert shown in text, shown
    assert "calibration sequences" not in text, "what is not known is not shown"


@pytest.mark.parametrize("part", ["quality", "position", "decode", "layers", "outliers", "overlap", "generation"])
def test_what_was_not_measured_leaves_no_trace(part):
    key = {"position": "positions", "overlap": "overlaps"}.get(part, part)
    rows = [row for row in sample_rows() if row["part"] != part and (part != "quality" or row["part"] != "verdict")]
    seen = Reader(report_page(FACTS, rows))
    assert key not in seen.ids and len(seen.ids) >= 8 and not seen.open


def places(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_a_chart_puts_points_where_they_belong():
    points = [Point(0, 1.0), Point(1, 0.1), Point(2, 0.0), Point(3, 0.01, low=-1.0, high=0.02)]
    svg = line_chart("t", [Series("a", 0, points)], Axis("x"), Axis("y", log=True))
    (first, second, last) = places(svg)  # a log axis has no place for 0
    assert first[0] < second[0] < last[0] and first[1] < second[1] < last[1], "smaller values stand lower"
    assert second[1] - first[1] == pytest.approx(last[1] - second[1], abs=0.2), "decades are alike"
    assert last[0] - second[0] == pytest.approx(2 * (second[0] - first[0]), abs=0.2)
    assert svg.count("whisker") == 1 and svg.count("<title>a</title>") == 3
    ticks = re.findall(r'text-anchor="end">([^<]*)<', svg)
    assert ticks[:3] in (["0.01", "0.1", "1"], ["0.005", "0.01", "0.02"]), ticks


def test_labels_do_not_lie_on_each_other():
    series = [Series(f"scheme-{n}", 0, [Point(4.2, 0.1 + n / 1000)]) for n in range(6)]
    svg = point_chart("t", series, Axis("x", start=2, stop=17), Axis("y", log=True))
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)" class="name', svg))
    assert len(heights) == 6 and all(below - above >= 14.9 for above, below in pairwise(heights))


def test_pictures_of_nothing_and_of_one_value():
    assert "No values" in line_chart("t", [Series("a", 0, [Point(1, 0.0)])], Axis("x"), Axis("y", log=True))
    assert places(line_chart("t", [Series("a", 0, [Point(1, 5.0)])], Axis("x"), Axis("y", log=True)))
    assert "data:image/png" in heat_map("t", [[0.0, 1.0]], 2, 0.0, 1.0, "layer", "feature")
    assert ">100<" in colour_bar("range", 0.0, 2.5)


@pytest.mark.parametrize(
    "value, shown",
    [
        (0.0, "0"),
        (None, "–"),
        (0.1234, "0.12"),
        (1.25, "1.2"),
        (12.3, "12"),
        (0.0999, "0.10"),
        (0.00034, "0.00034"),
        (2.8e-6, "2.8e-06"),
    ],
)
def test_numbers_have_two_digits(value, shown):
    assert number(value) == shown
