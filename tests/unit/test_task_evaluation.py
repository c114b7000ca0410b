"""evaluate_tasks against answers worked out one by one from full logits, and its statistics against hand numbers."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.model_cases import logits_of, prompt_of
from helpers.task_cases import CHOICES, WORDS, Characters, write_lines

from megatron_lowbit.calibration_run import calibrate
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.task_evaluation import evaluate_tasks
from megatron_lowbit.task_questions import LAST_WORDS, read_task, scored_sequences
from megatron_lowbit.task_scoring import passes, score_answers
from megatron_lowbit.task_statistics import Flips, Resampled, resample
from megatron_lowbit.weights import load_weights

RANKS, VOCABULARY = 3, 131
SCHEME = "int4-group"


@pytest.fixture(scope="module")
def weights(tiny_models):
    return load_weights(tiny_models("odd"), ParallelContext.virtual_ranks(RANKS), torch.float32)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    rows = {"things": CHOICES, "hats": WORDS}
    return [read_task(write_lines(root / f"{name}.jsonl", lines)) for name, lines in rows.items()]


def plain(weights, task, scheme, calibration=None):
    """Answers and whether they are right by metric, log-likelihoods of right ones; shares logits with the library."""
    given, right, nats = {"acc": [], "acc_norm": []}, {"acc": [], "acc_norm": []}, []
    for question in task.questions:
        sums, likeliest = [], []
        for answer in question.answers:
            before = len(question.prompt) + 1  # BOS
            tokens = [1, *(ord(character) % VOCABULARY for character in f"{question.prompt} {answer}")]
            log_probs = logits_of(weights, tokens, scheme, calibration).double().log_softmax(dim=-1)
            sums.append(sum(float(log_probs[at - 1, tokens[at]]) for at in range(before, len(tokens))))
            likeliest.append(log_probs[before - 1 : -1].argmax(dim=-1).tolist())
        nats.append(sums[question.gold])
        if task.kind == LAST_WORDS:
            given["acc"].append(likeliest[0])
            right["acc"].append(likeliest[0] == tokens[before:])
            continue
        normed = [value / len(answer) for value, answer in zip(sums, question.answers, strict=True)]
        for metric, values in (("acc", sums), ("acc_norm", normed)):
            given[metric].append(values.index(max(values)))
            right[metric].append(given[metric][-1] == question.gold)
    return given, right, nats


def test_rows_equal_answers_worked_out_one_by_one(weights, tasks):
    evaluated = evaluate_tasks(weights, [SCHEME], tasks, Characters(131))
    rows = {(row.task, row.metric, row.scheme): row for row in evaluated}
    metrics = [("things", "acc"), ("things", "acc_norm"), ("hats", "acc"), ("mean", "acc"), ("mean", "acc_norm")]
    assert list(rows) == [(*each, scheme) for each in metrics for scheme in ("bf16", SCHEME)]
    for task in tasks:
        base_given, base_right, base_nats = plain(weights, task, "bf16")
        given, right, nats = plain(weights, task, SCHEME)
        count = len(nats)
        for metric in ("acc", "acc_norm") if task.name == "things" else ("acc",):
            row, base = rows[task.name, metric, SCHEME], rows[task.name, metric, "bf16"]
            assert row.score.mean == pytest.approx(sum(right[metric]) / count)
            assert base.score.mean == pytest.approx(sum(base_right[metric]) / count)
            assert row.difference.mean == pytest.approx(row.score.mean - base.score.mean)
            pairs = list(zip(right[metric], base_right[metric], strict=True))
            assert row.flips == Flips(
                sum(one != other for one, other in zip(given[metric], base_given[metric], strict=True)) / count,
                sum(other and not one for one, other in pairs) / count,
                sum(one and not other for one, other in pairs) / count,
            )
            # FP32 sums of 20 log-probabilities of size 5, products in another order
            assert row.log_likelihood == pytest.approx(sum(nats) / count, rel=1e-4)
            change = sum(nats) - sum(base_nats)
            assert row.log_likelihood_change.mean == pytest.approx(change / count, rel=0.02, abs=1e-3)
            assert base.difference.row("d") == {"d": 0, "d_low": 0, "d_high": 0} and base.flips == Flips(0, 0, 0)
            assert row.questions == count and row.tokens_per_s > 0
    assert rows["things", "acc", SCHEME].flips.flips > 0 < rows["hats", "acc", SCHEME].flips.flips  # 4 bits do show
    hats = rows["hats", "acc", "bf16"]
    assert hats.perplexity == pytest.approx(math.exp(-hats.log_likelihood)) and hats.retained is None  # none is right
    mean = rows["mean", "acc_norm", SCHEME]
    assert mean.score.mean == pytest.approx(
        (rows["things", "acc_norm", SCHEME].score.mean + rows["hats", "acc", SCHEME].score.mean) / 2
    )
    assert mean.questions == len(CHOICES) + len(WORDS) and mean.perplexity is None
    assert all(value is None or math.isfinite(value) for value in list(mean.fields().values())[4:])


def test_calibrated_schemes_and_the_answer_when_nothing_is_sent(weights, tasks, tiny_models):
    calibration = calibrate(weights, [prompt_of(131, 40, start) for start in range(5)], "0" * 64)
    with pytest.raises(ValueError, match="calibrat"):
        evaluate_tasks(weights, ["balanced"], tasks, Characters(131))
    rows = evaluate_tasks(weights, ["bf16", "int4-outlier"], tasks[:1], Characters(131), calibration)
    assert [row.scheme for row in rows] == ["bf16", "int4-outlier"] * 2
    expected = plain(weights, tasks[0], "int4-outlier", calibration)
    assert rows[1].score.mean == pytest.approx(sum(expected[1]["acc"]) / len(CHOICES))
    alone = load_weights(tiny_models("odd"), ParallelContext.single(), torch.float32)
    rows = evaluate_tasks(alone, [SCHEME], tasks, Characters(131))
    assert all(row.flips == Flips(0, 0, 0) for row in rows)


@pytest.mark.parametrize("tokens_at_once, logits_at_once", [(1, 131), (70, 1000), (2048, 1 << 26)])
def test_batches_and_blocks_change_nothing_but_rounding(weights, tasks, tokens_at_once, logits_at_once):
    model = weights.build_with_scheme(parse_scheme("int8-group"))
    for task in tasks:
        sequences = scored_sequences(Characters(131), task, 96)
        groups = list(passes(sequences, tokens_at_once))
        assert [one for group in groups for one in group] == sequences
        assert all(len(group) == 1 or sum(len(one.tokens) for one in group) <= tokens_at_once for group in groups)
        expected = [score_answers(model, [one], True) for one in sequences]
        found = [score_answers(model, group, True, logits_at_once) for group in groups]
        both = [torch.cat([scores.log_likelihood_S for scores in part]) for part in (found, expected)]
        # at 8 bits: now and then a value falls on the other side of a code's border
        torch.testing.assert_close(*both, rtol=1e-3, atol=1e-3)
        assert [one for scores in found for one in scores.likeliest] == [one.likeliest[0] for one in expected]


def test_what_the_baseline_answers_is_right_where_the_file_says_so(weights, tasks, tmp_path):
    """Files that take over the baseline's own answers, but for one question each."""
    given = plain(weights, tasks[0], "bf16")[0]["acc"]
    assert len(set(given)) == 3
    choices = [{**row, "gold": gold} for row, gold in zip(CHOICES, given, strict=True)]
    choices[4]["gold"] = 1 - choices[4]["gold"]
    hats = []
    for context in (f"{row['query']} {choice} " for row in CHOICES for choice in row["choices"]):
        tokens = Characters(131).encode(context)
        character = chr(int(logits_of(weights, tokens, "bf16")[-1].argmax()))
        if character.strip() and ord(character) < 128:
            hats.append({"context": context, "continuation": character})
    assert len(hats) > 5
    hats[2]["continuation"] = "?"
    found = [read_task(write_lines(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("c", choices), ("h", hats))]
    evaluated = evaluate_tasks(weights, [SCHEME], found, Characters(131))
    rows = {(row.task, row.metric, row.scheme): row for row in evaluated}
    for task, lines in (("c", choices), ("h", hats)):
        base, row = rows[task, "acc", "bf16"], rows[task, "acc", SCHEME]
        assert base.score.mean == pytest.approx(1 - 1 / len(lines))
        assert row.score.mean <= base.score.mean + row.flips.wrong_to_right
        assert row.retained.mean == pytest.approx(row.score.mean / base.score.mean)
        assert row.flips.right_to_wrong > 0 and row.retained.low < row.retained.mean


def test_resamples_have_the_spread_that_hand_numbers_say():
    """100 questions, of which the baseline has 60 right; the scheme loses 10 of those and wins 4."""
    base_Q = torch.tensor([1.0] * 60 + [0.0] * 40)
    found_Q = torch.tensor([1.0] * 50 + [0.0] * 10 + [1.0] * 4 + [0.0] * 36)
    means = resample({"base": base_Q, "found": found_Q}, seed=3)
    assert (means["base"].mean, means["found"].mean) == pytest.approx((0.60, 0.54))
    # variance of a paired difference: (10 + 4) / 100 - 0.06^2; half widths to the resamples' own noise and grid of 0.01
    difference = means["found"].minus(means["base"])
    half = 1.96 * math.sqrt((0.14 - 0.06**2) / 100)
    bounds = (difference.low, difference.high)
    assert (difference.mean, *bounds) == pytest.approx((-0.06, -0.06 - half, -0.06 + half), abs=0.011)
    retained = means["found"].share_of(means["base"])
    # by the delta method: variance of (found - 0.9 base) / 0.6
    half = 1.96 * math.sqrt((0.5 * 0.1**2 + 0.1 * 0.9**2 + 0.04) / 100) / 0.6
    assert (retained.mean, retained.low, retained.high) == pytest.approx((0.9, 0.9 - half, 0.9 + half), abs=0.015)
    score = means["base"].interval()
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert (score.low, score.high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.011)
    again = resample({"base": base_Q, "found": found_Q}, seed=3)
    assert torch.equal(again["found"].means_B, means["found"].means_B)
    # two such tasks know the difference sqrt(2) times as well
    other = resample({"base": base_Q, "found": found_Q}, seed=4)
    average = [Resampled.average([means[name], other[name]]) for name in ("found", "base")]
    both = average[0].minus(average[1])
    assert (both.mean, both.high - both.low) == pytest.approx(
        (-0.06, (difference.high - difference.low) / math.sqrt(2)), abs=0.012
    )


def test_ratios_to_nothing():
    zero, some = torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 0.0])
    means = resample({"zero": zero, "some": some, "all": torch.ones(4)}, seed=0)
    assert means["some"].share_of(means["zero"]) is None
    assert means["some"].share_of(means["some"]).row("r") == {"r": 1.0, "r_low": 1.0, "r_high": 1.0}
    found = means["all"].share_of(means["some"])  # a third of the resamples have nothing to share
    assert found.mean == 4.0 and found.low < 2 and found.high is None


def test_flips_by_hand():
    right, base_right = torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])
    assert Flips.between([0, 1, 0, 2], right, [0, 0, 1, 1], base_right) == Flips(0.75, 0.25, 0.25)
    assert Flips.average([Flips(0.75, 0.25, 0.25), Flips(0.25, 0.25, 0.0)]) == Flips(0.5, 0.25, 0.125)
