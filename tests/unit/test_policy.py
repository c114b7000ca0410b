"""Policy: which collective a message takes, the file it comes from, and that numbers follow the choice alone."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from helpers.messages import draw_message, same_bits

from megatron_lowbit.comm.all_reduce import build_all_reduce
from megatron_lowbit.comm.policy import (
    WHOLE,
    Choice,
    Policy,
    PolicyLog,
    default_policy,
    load_policy,
    policy_from_json,
    save_policy,
    shared_policy,
)
from megatron_lowbit.parallel import ParallelContext

STEPS = Policy(((100, Choice("exact")), (1000, Choice("one-stage")), (5000, Choice("two-stage", 64))))


@pytest.mark.parametrize(
    ("tokens", "hidden", "expected"),
    [
        *((0, 8, "exact"), (5, 10, "exact")),
        *((5, 11, "one-stage"), (50, 10, "one-stage")),
        *((51, 10, "two-stage"), (9999, 10, "two-stage")),
    ],
)
def test_the_size_decides_and_the_last_choice_holds_beyond(tokens, hidden, expected):
    """Sizes are of 16-bit messages, borders included in the smaller class."""
    assert STEPS.choose(tokens, hidden).collective == expected


@pytest.mark.parametrize("ranks", range(2, 9))
def test_defaults_grow_from_exact_to_two_stages(ranks):
    policy = default_policy(ranks)
    order = [policy.choose(tokens, 1024).collective for tokens in (1, 2, 4, 8, 16, 64, 256, 4096)]
    rank = ["exact", "one-stage", "two-stage"].index
    assert [*map(rank, order)] == sorted(map(rank, order))
    assert order[0] == "exact" and order[-1] == "two-stage"
    if ranks > 4:  # one stage moves (R-1)/2 times the bytes
        assert policy.choose(13, 1024).collective == "two-stage"


def test_one_rank_has_a_policy_too():
    assert default_policy(1).choose(10**6, 4096).collective == "exact"


def test_each_choice_has_the_numbers_of_its_collective():
    message = draw_message(4, 3, "int4-outlier", tokens=9, hidden=128)
    context = ParallelContext.virtual_ranks(3)
    partials = torch.stack(message.partials)

    def built(policy):
        return build_all_reduce(
            context, message.scheme, 128, message.constants, policy=policy, dtype=message.partials[0].dtype
        )

    policy = Policy(((2 * 128, Choice("exact")), (2 * 128 * 4, Choice("one-stage")), (WHOLE, Choice("two-stage"))))
    for tokens in (1, 4, 5, 9):
        alone = Policy(((WHOLE, policy.choose(tokens, 128)),))
        assert same_bits(built(policy)(partials[:, :tokens]), built(alone)(partials[:, :tokens]))
    forced = build_all_reduce(context, message.scheme, 128, message.constants)
    assert same_bits(built(policy)(partials), forced(partials))
    one = partials[:, :1]
    assert same_bits(built(policy)(one), one[0].float() + one[1].float() + one[2].float())
    assert not same_bits(built(policy)(one), forced(one)), "or the choice would not matter"


def test_a_one_stage_scheme_stays_as_it_is():
    message = draw_message(4, 2, "int4-group:one-stage", tokens=3, hidden=64)
    context = ParallelContext.virtual_ranks(2)
    free = build_all_reduce(context, message.scheme, 64, message.constants, policy=default_policy(2))
    forced = build_all_reduce(context, message.scheme, 64, message.constants)
    partials = torch.stack(message.partials)
    assert same_bits(free(partials), forced(partials))


def test_choices_are_counted_and_logged_once_a_size_class(caplog):
    log = PolicyLog()
    with caplog.at_level(logging.INFO):
        for tokens in (1, 1, 1, 50, 51, 51):
            log.add(STEPS.choose(tokens, 10), tokens, 10)
    assert log.counts == {"exact": 3, "one-stage": 1, "two-stage in pieces of 0 KiB": 2}
    assert len(caplog.records) == 3, [record.message for record in caplog.records]


def test_a_file_there_and_back(tmp_path):
    save_policy(STEPS, tmp_path / "policy.json", {"tp": 2})
    assert load_policy(tmp_path / "policy.json").steps == STEPS.steps
    assert json.loads((tmp_path / "policy.json").read_text())["conditions"] == {"tp": 2}
    assert shared_policy(ParallelContext.single(), tmp_path / "policy.json") is not None
    assert shared_policy(ParallelContext.single(), None) is None
    assert shared_policy(ParallelContext.virtual_ranks(3), "auto") == default_policy(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(version=2), "not a policy of version 1"),
        (lambda data: data.pop("steps"), "not a policy"),
        (lambda data: data["steps"].clear(), "at least one"),
        (lambda data: data["steps"].reverse(), "ascending"),
        (lambda data: data["steps"][0].update(collective="fast"), "collective 'fast' is unknown; allowed: exact, one-"),
        (lambda data: data["steps"][0].update(piece_nbytes=-1), "piece_nbytes is -1"),
        (lambda data: data["steps"][0].update(piece_nbytes="1"), "piece_nbytes is '1'"),
        (lambda data: data["steps"][0].update(largest_nbytes=True), "needs exactly"),
        (lambda data: data["steps"][0].update(speed=3), "needs exactly collective, largest_nbytes, piece_nbytes"),
        (lambda data: data["steps"].append(7), "step 7"),
    ],
)
def test_an_unknown_setting_is_an_error(change, message):
    data = STEPS.to_json()
    change(data)
    with pytest.raises(ValueError, match=message) as caught:
        policy_from_json(data, "mine.json")
    assert "mine.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_a_file_that_is_no_policy(tmp_path, text):
    path = tmp_path / "policy.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"policy\.json"):
        load_policy(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="is not a readable policy file"):
        load_policy(tmp_path / "none.json")
