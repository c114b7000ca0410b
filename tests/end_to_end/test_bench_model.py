"""`bench-model` over real ranks on a tiny random model, and `plan --validate` over its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Workshop, call, errors

from lowbit_tools.plan_collectives import Link, choice_for, collective_time
from megatron_lowbit.comm.policy import policy_from_json
from megatron_lowbit.comm.schemes import parse_scheme

HIDDEN, LAYERS = 96, 2
CONFIG = dict(
    model_type="llama", hidden_size=HIDDEN, intermediate_size=100, num_hidden_layers=LAYERS, num_attention_heads=6,
    num_key_value_heads=2, vocab_size=200, max_position_embeddings=64, tie_word_embeddings=True,
)  # fmt: skip
NAMES = ["torch.distributed.all_reduce", "bf16", "int4-outlier", "int4-outlier, policy"]
PROMPTS, NEW_TOKENS = [5, 30], 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two ranks and of one."""
    root = tmp_path_factory.mktemp("bench-model")
    (root / "config.json").write_text(json.dumps(CONFIG))
    flags = ["--prompt-tokens", "5,30", "--new-tokens", NEW_TOKENS, "--rounds", 2]
    for ranks in (1, 2):
        call("bench-model", "--config", root / "config.json", *flags, "--tp", ranks, "--json", root / f"{ranks}.json")
    return root


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    written = json.loads(path.read_text())
    return written["conditions"], written["rows"]


def test_every_scheme_has_a_row_for_each_prompt(folder: Path) -> None:
    facts, rows = read(folder / "2.json")
    assert facts["tp"] == 2 and facts["weights"] == "random, seed 0" and facts["hosts"] == 1 and facts["overlaps"]
    assert "random tokens" in facts["scales"] and facts["codec_nbytes_per_s"] is None
    assert [(row["prompt_tokens"], row["scheme"]) for row in rows] == [(n, name) for n in PROMPTS for name in NAMES]
    for row in rows:
        for phase in ("ttft", "step"):
            assert 0 < row[f"{phase}_low_s"] <= row[f"{phase}_s"] <= row[f"{phase}_high_s"]
            assert 0 < row[f"{phase}_sync_share"] < 1
            low, high = row[f"{phase}_ratio_interval"]
            assert low <= row[f"{phase}_ratio_to_torch"] <= high
    for phase in ("ttft", "step"):  # rows of the embedding and best tokens are the same whatever the scheme
        for of_prompt in (rows[: len(NAMES)], rows[len(NAMES) :]):
            assert len({row[f"{phase}_elsewhere_nbytes"] for row in of_prompt}) == 1
            assert of_prompt[0][f"{phase}_elsewhere_nbytes"] > 0
    assert all(row["ttft_ratio_to_torch"] == 1 and row["ttft_sent_nbytes"] is None for row in rows[:: len(NAMES)])


def test_the_bytes_sent_are_those_that_a_plan_counts(folder: Path) -> None:
    facts, rows = read(folder / "2.json")
    policy = policy_from_json(facts["policy"], "the conditions")
    for row in rows:
        if row["scheme"] == NAMES[0]:
            continue
        scheme = parse_scheme(row["scheme"].removesuffix(", policy"))
        followed = policy if row["scheme"].endswith("policy") else None
        for phase, tokens in (("ttft", row["prompt_tokens"]), ("step", 1)):
            choice = choice_for(scheme, followed, tokens, HIDDEN)
            modelled = collective_time(scheme, choice, tokens, HIDDEN, 2, Link(1.0, 0.0), 1.0)
            assert row[f"{phase}_sent_nbytes"] == 2 * LAYERS * modelled.sent_nbytes, row
            assert row[f"{phase}_collective"] == (choice.name if followed else "")


def test_one_rank_gives_the_rates_that_a_plan_needs(folder: Path) -> None:
    facts, rows = read(folder / "1.json")
    assert [row["scheme"] for row in rows] == ["one rank"] * 2
    assert set(facts["codec_nbytes_per_s"]) == {"bf16", "int4-outlier"}
    assert all(rate > 1e6 for rate in facts["codec_nbytes_per_s"].values())
    out = folder / "validated.json"
    done = call(
        "plan", "--validate", folder / "2.json", "--alone", folder / "1.json", "--link", "10gbit,100us", "--json", out
    )
    assert "MODELLED beside measured" in done.stdout
    _, validated = read(out)
    assert [row["scheme"] for row in validated] == NAMES * 2
    assert all(row["ttft_measured_s"] > 0 and row["ttft_modelled_s"] > 0 for row in validated)


def test_a_checkpoint_with_its_calibration(workshop: Workshop) -> None:
    out = workshop.root / "bench-model.json"
    flags = ["--schemes", "int4-outlier", "--prompt-tokens", 6, "--new-tokens", 2, "--rounds", 1, "--policy", "none"]
    call("bench-model", workshop.tp2, "--calibration", workshop.calibration, *flags, "--tp", 2, "--json", out)
    facts, rows = read(out)
    assert facts["weights"] == "checkpoint" and facts["dtype"] == "fp32" and facts["policy"] is None
    assert facts["scales"] == str(workshop.calibration)
    assert [row["scheme"] for row in rows] == [NAMES[0], "int4-outlier"]


def test_a_prompt_that_does_not_fit(folder: Path) -> None:
    done = call("bench-model", "--config", folder / "config.json", "--prompt-tokens", 60, "--new-tokens", 5, code=2)
    assert "context of 64 tokens" in errors(done)[0]
