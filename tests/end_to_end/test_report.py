"""`report` and `eval --path decode` as a user runs them: a page and its numbers, the same over real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import HIDDEN, LAYERS, Workshop, call, errors

from lowbit_tools.report_page import report_page
from megatron_lowbit.comm.presets import PRESETS

SCHEMES = ["bf16", "int4-outlier", "balanced-portable"]
SIZES = ["--windows", 3, "--length", 48, "--lengths", 24, "--decode-batches", "1,3", "--decode-positions", 8]
SIZES += ["--layer-windows", 1, "--prompts", 3, "--new-tokens", 6]


@pytest.fixture(scope="module")
def reports(workshop: Workshop) -> dict[str, dict[str, Any]]:
    """The JSON of two virtual ranks and of two real ones."""
    found = {}
    for flag in ("--virtual-tp", "--tp"):
        page, out = workshop.root / f"report{flag}.html", workshop.root / f"report{flag}.json"
        flags = ["--text", workshop.text, "--calibration", workshop.calibration, "--out", page, "--json", out]
        done = call("report", workshop.tp2, flag, 2, "--schemes", ",".join(SCHEMES), *flags, *SIZES)
        assert "Verdicts" in done.stdout and str(page) in done.stdout
        written = json.loads(out.read_text())
        assert page.read_text(encoding="utf-8") == report_page(written["conditions"], written["rows"])
        found[flag] = written
    return found


def test_it_names_its_conditions(reports: dict[str, dict[str, Any]], workshop: Workshop) -> None:
    facts = reports["--tp"]["conditions"]
    manifest = json.loads((workshop.tp2 / "manifest.json").read_text())
    assert facts["fingerprint"] and len(facts["text_sha256"]) == 64 and manifest
    assert (facts["model"], facts["tp"], facts["virtual_ranks"], facts["dtype"]) == ("tp2", 2, False, "fp32")
    assert (facts["windows"], facts["length"], facts["hidden"], facts["layers"]) == (3, 48, HIDDEN, LAYERS)
    assert facts["calibration_sequences"] == 20
    assert facts["schemes"] == [*SCHEMES[:2], f"balanced-portable = {PRESETS['balanced-portable']}"]


def test_real_ranks_measure_what_virtual_ones_do(reports: dict[str, dict[str, Any]]) -> None:
    virtual, real = ([{**row} for row in reports[flag]["rows"]] for flag in ("--virtual-tp", "--tp"))
    assert len(virtual) == len(real) > 40
    assert {row["part"] for row in real} == {
        "verdict", "quality", "position", "length", "decode", "layers", "outliers", "overlap", "generation",
    }  # fmt: skip
    for one, other in zip(virtual, real, strict=True):
        assert one.keys() == other.keys() and (one["part"], one.get("scheme")) == (other["part"], other.get("scheme"))
        for key in ("kl", "error", "reduce_error", "drift", "value"):
            if one.get(key) is not None:  # products of other shapes, and a code now and then on the other side
                assert other[key] == pytest.approx(one[key], rel=0.1, abs=1e-5), (one, other)
        for key in ("tokens", "mean_bits_per_value", "sent_nbytes_per_token_per_rank", "outliers", "log10_ranges"):
            assert one.get(key) == other.get(key), (one, other)


def test_decoding_is_evaluated_alone_too(workshop: Workshop) -> None:
    out = workshop.root / "decode.json"
    flags = ["--text", workshop.text, "--windows", 5, "--length", 32, "--path", "decode", "--batch", 2]
    done = call("eval", workshop.tp2, "--tp", 2, "--schemes", "bf16", *flags, "--decode-tokens", 4, "--json", out)
    written = json.loads(out.read_text())
    (row,) = written["rows"]
    assert (row["path"], row["batch"], row["tokens"]) == ("decode", 2, 4 * 4), "two batches of two, one window left out"
    assert written["conditions"]["windows"] == 4 and row["decode_tokens_per_s"] > 0
    assert "decoded one by one" in " ".join(done.stdout.split()) and "prefill" not in done.stdout
    done = call("eval", workshop.tp2, "--tp", 2, "--schemes", "bf16", *flags, "--decode-tokens", 40, code=2)
    assert "allowed: 1 to 30" in errors(done)[0]


def test_mistakes_cost_one_line(workshop: Workshop, tmp_path: Path) -> None:
    done = call("report", workshop.tp2, "--schemes", "bf16", "--out", tmp_path / "r.html", code=2)
    assert "--virtual-tp N" in errors(done)[0] and not (tmp_path / "r.html").exists()
