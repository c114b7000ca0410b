"""`eval-tasks` as a user runs it, over virtual ranks and over real ones, on files the test writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Workshop, call, errors
from helpers.task_cases import CHOICES, WORDS, write_lines

#: the stable keys, in their order; more may follow
ROW = [
    "task", "kind", "scheme", "metric", "questions", "score", "score_low", "score_high", "difference",
    "difference_low", "difference_high", "retained", "retained_low", "retained_high", "flips", "right_to_wrong",
    "wrong_to_right", "log_likelihood", "log_likelihood_change", "log_likelihood_change_low",
    "log_likelihood_change_high", "perplexity", "tokens", "tokens_per_s",
]  # fmt: skip
SCHEMES = ["bf16", "int4-outlier", "balanced"]


@pytest.fixture(scope="module")
def files(workshop: Workshop) -> list[Path]:
    rows = {"things": CHOICES, "hats": WORDS}
    return [write_lines(workshop.root / f"{name}.jsonl", lines) for name, lines in rows.items()]


@pytest.fixture(scope="module")
def written(workshop: Workshop, files: list[Path]) -> dict[str, dict[str, Any]]:
    """The JSON of two virtual ranks and of two real ones."""
    found = {}
    for flag in ("--virtual-tp", "--tp"):
        out = workshop.root / f"eval-tasks{flag}.json"
        done = call(
            "eval-tasks", workshop.tp2, flag, 2, "--tasks", ",".join(map(str, files)), "--schemes",
            "int4-outlier,balanced", "--calibration", workshop.calibration, "--limit", 8, "--json", out,
        )  # fmt: skip
        assert "beside those of bf16" in done.stdout and done.stdout.count("things") == 6
        found[flag] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("flag", ["--virtual-tp", "--tp"])
def test_it_writes_rows_by_task_metric_and_scheme(written: dict[str, dict[str, Any]], flag: str) -> None:
    facts, rows = written[flag]["conditions"], written[flag]["rows"]
    assert facts["tp"] == 2 and facts["virtual_ranks"] == (flag == "--virtual-tp") and facts["baseline"] == "bf16"
    assert {name: task["questions"] for name, task in facts["tasks"].items()} == {"things": 8, "hats": 5}
    metrics = [("things", "acc"), ("things", "acc_norm"), ("hats", "acc"), ("mean", "acc"), ("mean", "acc_norm")]
    assert [(row["task"], row["metric"], row["scheme"]) for row in rows] == [
        (*metric, scheme) for metric in metrics for scheme in SCHEMES
    ]
    for row in rows:
        assert list(row)[: len(ROW)] == ROW
        assert 0 <= row["score_low"] <= row["score"] <= row["score_high"] <= 1 and row["tokens_per_s"] > 0
        assert (row["perplexity"] is None) == (row["kind"] != "last words")
        if row["scheme"] == "bf16":
            assert row["difference"] == row["flips"] == row["log_likelihood_change"] == 0


def test_real_ranks_say_what_virtual_ones_do(written: dict[str, dict[str, Any]]) -> None:
    for found, expected in zip(written["--tp"]["rows"], written["--virtual-tp"]["rows"], strict=True):
        assert found["tokens"] == expected["tokens"]
        # products of other shapes; now and then a value falls on the other side of a code's border
        assert found["log_likelihood"] == pytest.approx(expected["log_likelihood"], rel=1e-2)
        if found["scheme"] == "bf16":
            assert found["log_likelihood"] == pytest.approx(expected["log_likelihood"], rel=1e-3)


def test_wrong_files_cost_one_line(workshop: Workshop, files: list[Path], tmp_path: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", [*CHOICES, {"query": "q"}])
    flags = ["--schemes", "bf16", "--tp", 2]
    done = call("eval-tasks", workshop.tp2, "--tasks", f"{files[0]},{bad}", *flags, code=2)
    (line,) = errors(done)
    assert f"{bad}, line {len(CHOICES) + 1}" in line
    shutil.copy(files[0], tmp_path / "things.jsonl")
    done = call("eval-tasks", workshop.tp2, "--tasks", f"{files[0]},{tmp_path / 'things.jsonl'}", *flags, code=2)
    assert "things" in errors(done)[0] and "rename" in errors(done)[0]
    long = write_lines(tmp_path / "long.jsonl", [{"context": 99 * "word ", "continuation": "x"}])
    done = call("eval-tasks", workshop.tp2, "--tasks", long, *flags, code=2)
    assert len(errors(done)) == 1 and "line 1: 497 tokens, the model takes up to 256" in errors(done)[0]
