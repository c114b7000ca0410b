"""`tune-scheme` through the command line: a file that eval, generate and bench-model take, on virtual and real ranks.

Virtual ranks run in this process: starting another one takes longer than the work.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command_line import Workshop, call

from lowbit_tools.cli import main
from megatron_lowbit.calibration.scheme_file import TunedScheme

BUDGET = 4.5
TEXT = ["--length", 32, "--sequences", 16]


def here(*words: object) -> int:
    """The exit code of the command line in this process."""
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def tuned(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    words = ["--virtual-tp", 2, "--budget-bits", BUDGET, "--text", workshop.text, *TEXT]
    assert here("tune-scheme", workshop.tp2, out, *words, "--json", out.with_suffix(".json")) == 0
    return out


def test_the_file_says_how_it_was_found(tuned: Path, workshop: Workshop) -> None:
    written = json.loads(tuned.with_suffix(".json").read_text())
    origin = TunedScheme.load(tuned).origin
    assert written["conditions"]["origin"] == vars(origin)
    assert origin.budget_bits == BUDGET and origin.wire_bits <= BUDGET
    assert (origin.model, origin.text) == (workshop.tp2.name, workshop.text.name)
    assert origin.kl <= origin.uniform_kl
    assert len(written["rows"]) == 4 and sum(row["error_share"] for row in written["rows"]) == pytest.approx(1.0)


def test_commands_take_it_alone(
    tuned: Path, workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks, text = ["--virtual-tp", 2], ["--text", workshop.text, "--windows", 3, "--length", 32]
    assert here("eval", workshop.tp2, *ranks, "--schemes", f"bf16,{tuned}", *text, "--json", tmp_path / "e.json") == 0
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert [row["scheme"] for row in rows] == ["bf16", "tuned.safetensors"]
    bits = (rows[1]["reduce_bits_per_value"] + rows[1]["gather_bits_per_value"]) / 2
    assert bits == pytest.approx(TunedScheme.load(tuned).origin.wire_bits) and 0 < rows[1]["kl_mean"] < 1
    capsys.readouterr()
    generated = ["--prompt", "Sent", "--max-new-tokens", 3, "--scheme", tuned]
    assert here("generate", workshop.tp2, *ranks, *generated) == 0 and capsys.readouterr().out.strip()


def test_real_ranks_find_one_too_with_a_calibration(workshop: Workshop, tmp_path: Path) -> None:
    """What ranks measure differs by rounding; they must agree on one scheme all the same, and bench-model takes it."""
    out = tmp_path / "real.safetensors"
    call(
        "tune-scheme", workshop.tp2, out, "--tp", 2, "--max-kl", 0.05, "--portable", "--text", workshop.text, *TEXT,
        "--calibration", workshop.calibration,
    )  # fmt: skip
    found = TunedScheme.load(out)
    assert found.scheme.portable and found.origin.kl <= 0.05 == found.origin.max_kl
    call(
        "bench-model", workshop.tp2, "--tp", 2, "--schemes", out, "--prompt-tokens", 8, "--new-tokens", 2,
        "--rounds", 1, "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert "real.safetensors" in {row["scheme"] for row in json.loads((tmp_path / "b.json").read_text())["rows"]}


def test_what_does_not_fit_costs_one_line(
    tuned: Path, workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--text", workshop.text, "--windows", 2, "--length", 32]
    evaluated = ["eval", workshop.tp2, *text, "--virtual-tp"]
    assert here(*evaluated, 3, "--schemes", tuned) == 2
    assert "made for 2 tensor-parallel ranks" in capsys.readouterr().err
    assert here(*evaluated, 2, "--schemes", workshop.calibration) == 2
    assert "calibration without a scheme" in capsys.readouterr().err
    out = tmp_path / "o.safetensors"
    assert here("tune-scheme", workshop.tp2, out, "--budget-bits", 4, "--text", workshop.text, *TEXT) == 2
    assert "at least 2" in capsys.readouterr().err and not out.exists()
