"""`tune` in real processes: a policy file that other commands take, the same on all ranks; and what is no policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command_line import Workshop, call, errors

from megatron_lowbit.comm.policy import COLLECTIVES, load_policy


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    out = folder / "policy.json"
    done = call("tune", out, "--tp", 3, "--hidden", 96, "--seconds", 2, "--json", folder / "timings.json")
    assert f"use it with --policy {out}" in done.stdout.replace("\n", "")
    return out


def test_the_file_holds_choices_and_what_they_were_measured_under(policy: Path) -> None:
    assert {choice.collective for _, choice in load_policy(policy).steps} <= set(COLLECTIVES)
    written = json.loads(policy.read_text())
    assert written["conditions"]["tp"] == 3 and written["conditions"]["hidden"] == 96
    rows = json.loads((policy.parent / "timings.json").read_text())["rows"]
    assert [row["tokens"] for row in rows[:3]] == [1, 2, 4]
    for row in rows:
        assert row["choice"] in row["median_us"] and row["torch_us"] > 0
        fastest = min(row["median_us"].values())
        assert row["median_us"][row["choice"]] <= 1.04 * fastest


def test_bench_times_what_the_policy_takes(policy: Path, tmp_path: Path) -> None:
    mine = json.loads(policy.read_text())
    mine["steps"] = [
        {"largest_nbytes": 2 * 96 * 4, "collective": "one-stage", "piece_nbytes": 0},
        {"largest_nbytes": 1 << 40, "collective": "two-stage", "piece_nbytes": 1024},
    ]
    edited, out = tmp_path / "edited.json", tmp_path / "rows.json"
    edited.write_text(json.dumps(mine))
    flags = ["--tokens", "0,4,64", "--hidden", 96, "--schemes", "int4-group", "--rounds", 2, "--link", "1gbit"]
    call("bench", "all-reduce", *flags, "--tp", 2, "--policy", edited, "--json", out)
    written = json.loads(out.read_text())
    chosen = {row["tokens"]: row for row in written["rows"] if row["scheme"] == "int4-group, policy"}
    assert [row["chosen"] for row in chosen.values()] == ["one-stage", "one-stage", "two-stage in pieces of 1 KiB"]
    # 4 rows of 48 code bytes and 2 scales to one peer; 32 own and 32 other rows of 64 each way
    assert chosen[4]["sent_nbytes"] == 4 * (48 + 4) and chosen[64]["sent_nbytes"] == 64 * (48 + 4)
    assert 0 < chosen[64]["link_use"] < 1000 and chosen[64]["ratio_low"] <= chosen[64]["ratio_high"]
    assert written["conditions"]["transport"] == "TCP connections of its own"


def test_generate_counts_what_the_policy_took(workshop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    flags = ["--prompt", "one two three", "--max-new-tokens", 3, "--scheme", "int4-group", "--tp", 2, "--json", out]
    call("generate", workshop.tp2, *flags)
    facts = json.loads(out.read_text())["conditions"]
    # 2 layers of 2 sync points: the prompt and 2 more steps, all of them small
    assert facts["collectives"] == {"exact": 12}
    call("generate", workshop.tp2, *flags, "--policy", "none")
    assert json.loads(out.read_text())["conditions"]["collectives"] == {}


@pytest.mark.parametrize("command", ["bench", "generate"])
def test_a_file_that_is_no_policy_is_said_once(workshop: Workshop, tmp_path: Path, command: str) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"version": 1, "steps": [{"largest_nbytes": 1, "collective": "fast", "piece_nbytes": 0}]}')
    words = ["all-reduce", "--hidden", 8] if command == "bench" else [workshop.tp2, "--prompt", "x"]
    done = call(command, *words, "--tp", 2, "--policy", bad, code=2)
    (line,) = errors(done)
    assert "collective 'fast' is unknown; allowed: exact, one-stage, two-stage" in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tp", 2, "--scheme", "int4:one-stage"], "is one-stage already"),
        (["--tp", 2, "--seconds", 0], "--seconds is 0"),
        (["--tp", 2, "--hidden", 0], "--hidden is 0"),
        (["--tp", 1], "at least 2 ranks"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path: Path, words: list, says: str) -> None:
    done = call("tune", tmp_path / "policy.json", *words, code=2)
    assert says in errors(done)[0]
    assert not (tmp_path / "policy.json").exists()
