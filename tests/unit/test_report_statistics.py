"""Intervals, summaries of scores and verdicts of a quality report, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_lowbit.quality_report_generation import first_difference, generation_row, repetition
from megatron_lowbit.quality_report_statistics import Interval, ScoreBook, t_quantile
from megatron_lowbit.quality_report_verdict import GRADES, grade_of, percent, verdict_rows
from megatron_lowbit.scoring import TokenScores


# published tables of Student's t, 97.5 %
@pytest.mark.parametrize("freedom, expected", [(1, 12.706), (7, 2.365), (30, 2.042), (31, 2.040), (60, 2.000)])
def test_quantiles_are_those_of_the_tables(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, abs=1e-3)


def test_an_interval_by_hand():
    found = Interval.of([1.0, 2.0, 6.0])  # mean 3, variance 7, standard error sqrt(7/3)
    half = 4.303 * math.sqrt(7 / 3)
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - half, 3 + half))
    assert Interval.of([5.0]).row("kl") == {"kl": 5.0, "kl_low": None, "kl_high": None}


def scores(kl, nll, agreed, windows=(0, 0, 1, 1), positions=(0, 1, 0, 1)) -> TokenScores:
    return TokenScores(*(torch.tensor(part) for part in (windows, positions, kl, nll, agreed)))


def test_a_summary_is_paired_and_by_window():
    book = ScoreBook()
    for half in (slice(0, 2), slice(2, 4)):  # as evaluate hands them over: piece by piece
        exact = scores([0.0] * 4, [1.0, 2.0, 11.0, 12.0], [True] * 4)
        found = scores([0.1, 0.3, 0.5, 0.9], [1.1, 2.3, 11.2, 12.4], [True, False, True, True])
        for name, whole in (("exact", exact), ("int4", found)):
            book.add(name, TokenScores(*(part[half] for part in vars(whole).values())))
    summary = book.summary("int4")
    assert (summary["windows"], summary["tokens"]) == (2, 4)
    assert summary["kl"] == pytest.approx(0.45)  # windows 0.2 and 0.7
    half_width = 12.706 * 0.5 / 2
    assert (summary["kl_low"], summary["kl_high"]) == pytest.approx((0.45 - half_width, 0.45 + half_width))
    assert summary["top1_agreement"] == 0.75
    # differences of windows are 0.2 and 0.3, however far apart the windows themselves are
    assert summary["perplexity_change"] == pytest.approx(math.expm1(0.25))
    assert summary["perplexity_change_high"] == pytest.approx(
        math.expm1(0.25 + 12.706 * 0.05), rel=1e-5
    )  # from FP32 numbers
    late = book.summary("int4", range(1, 2))
    assert (late["kl"], late["tokens"], late["top1_agreement"]) == (pytest.approx(0.6), 2, 0.5)
    assert book.summary("exact")["perplexity_change"] == 0.0


@pytest.mark.parametrize("one, other, at", [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2, 3], [1, 2], 2)])
def test_the_first_difference(one, other, at):
    assert first_difference(one, other) == first_difference(other, one) == at


def test_repetition_counts_runs_that_stood_before():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 8) == pytest.approx(4 / 5)
    assert repetition([1, 2]) == 0


def test_a_generation_row_by_hand():
    exact = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1, 1]]
    row = generation_row("int4", exact, [[1, 2, 3], [4, 0, 6], [7, 8, 0], [0, 1, 1]], 3)
    assert row["diverged_at"] == [None, 1, 2, 0]
    assert (row["median_diverged_at"], row["same_to_the_end"]) == (1, 0.25)
    most = generation_row("bf16", exact, [*exact[:3], [0, 1, 1]], 3)
    assert (most["median_diverged_at"], most["same_to_the_end"]) == (None, 0.75)


def test_grades_need_both_limits():
    names = [grade.name for grade in GRADES]
    assert grade_of(0.0003, 0.0).name == names[0]
    assert grade_of(0.0003, 0.02).name == names[2]
    assert grade_of(0.02, -0.5).name == names[2]
    assert grade_of(0.3, 0.0).name == grade_of(math.nan, 0.0).name == names[-1]
    assert [grade_of(grade.kl, 0.0).name for grade in GRADES] == names


def quality_row(**changed) -> dict:
    return {
        "part": "quality", "scheme": "int4", "kl": 0.02, "kl_low": 0.01, "kl_high": 0.04, "perplexity_change": 0.02,
        "perplexity_change_low": 0.01, "perplexity_change_high": 0.029, "top1_agreement": 0.925,
    } | changed  # fmt: skip


def test_a_verdict_says_what_the_numbers_say():
    (verdict,) = verdict_rows([quality_row()])
    assert (verdict["scheme"], verdict["grade"], verdict["worst_grade"]) == ("int4", "small loss", "small loss")
    assert "differs in 7.5 of 100 places" in verdict["text"]
    assert "rises by 2.0 % (+1.0 % to +2.9 %)" in verdict["text"]
    (wide,) = verdict_rows([quality_row(kl_high=0.3)])
    assert wide["grade"] == "small loss" and wide["worst_grade"] == "heavy loss" and "more windows" in wide["text"]
    # a change that is not shown does not count, however large it looks
    (noisy,) = verdict_rows([quality_row(perplexity_change=0.09, perplexity_change_low=-0.1)])
    assert noisy["grade"] == "small loss" and "not shown" in noisy["text"]
    (bad,) = verdict_rows([quality_row(perplexity_change=0.09, perplexity_change_high=0.2)])
    assert bad["grade"] == "clear loss" and bad["worst_grade"] == "heavy loss"
    (single,) = verdict_rows([quality_row(kl_high=None, perplexity_change_low=None)])
    assert single["worst_grade"] is None and "one window" in single["text"]


def test_a_verdict_mentions_decoding_and_texts_where_they_are_worse():
    decode = {"part": "decode", "scheme": "int4", "batch": 32, "kl": 0.06, "kl_low": 0.05, "prefill_kl": 0.02}
    texts = {
        "part": "generation", "scheme": "int4", "new_tokens": 64, "median_diverged_at": 9, "repetition": 0.5,
        "exact_repetition": 0.1,
    }  # fmt: skip
    (verdict,) = verdict_rows([quality_row(), decode, texts])
    assert "(32 at once) KL is 3.0 times" in verdict["text"]
    assert "by token 10." in verdict["text"]
    usual = texts | {"scheme": "bf16", "median_diverged_at": 12}
    assert "by token 10 (with bf16, by token 13)." in verdict_rows([quality_row(), texts, usual])[0]["text"]
    usual |= {"median_diverged_at": None}
    assert "by token 10 (with bf16, after 64)." in verdict_rows([quality_row(), texts, usual])[0]["text"]
    assert "50.0 % of 4-grams, exact 10.0 %" in verdict["text"]
    alike = [decode | {"kl_low": 0.015}, texts | {"median_diverged_at": None, "repetition": 0.12}]
    (verdict,) = verdict_rows([quality_row(), *alike])
    assert "at once" not in verdict["text"] and "repeat" not in verdict["text"]
    assert "At least half" in verdict["text"]


def test_percentages_read_well():
    assert [percent(value) for value in (0.0, 0.0012, -0.0123, 1.24)] == ["0 %", "+0.12 %", "-1.2 %", "+124 %"]
