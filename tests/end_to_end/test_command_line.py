"""The command line in real processes, on a tiny random Llama: convert, calibrate, generate, eval, bench, torchrun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import HIDDEN, LAYERS, Workshop, call, errors

#: the stable keys, in their order; more may follow
EVAL_ROW = [
    "scheme", "stages", "reduce_bits_per_value", "gather_bits_per_value", "sent_nbytes_per_token_per_rank",
    "perplexity", "perplexity_ratio", "kl_mean", "kl_stderr", "top1_agreement", "tokens", "prefill_tokens_per_s",
]  # fmt: skip
BENCH_ROW = ["tokens", "hidden", "scheme", "tp", "median_us", "p10_us", "p90_us", "ratio_to_torch_all_reduce"]
CONDITIONS = {"tp", "virtual_ranks", "dtype", "device", "torch", "commit", "date"}
SCHEMES = ["exact", "bf16", "int8-group", "int4-group", "int4", "int4-random:seed=1", "int4-outlier", "bf16:one-stage",
           "int4-outlier:one-stage"]  # fmt: skip


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(written) == ["conditions", "rows"]
    assert set(written["conditions"]) >= CONDITIONS
    return written["conditions"], written["rows"]


def test_conversion_leaves_a_file_a_rank_and_a_manifest(workshop: Workshop) -> None:
    _, rows = read(workshop.root / "convert.json")
    assert [row["rank"] for row in rows] == [0, 1]
    manifest = json.loads((workshop.tp2 / "manifest.json").read_text(encoding="utf-8"))
    for row in rows:
        assert (workshop.tp2 / row["file"]).is_file()
        assert row["file"] in json.dumps(manifest)
    again = call("convert", workshop.hf, workshop.tp2, "--tp", 2, code=2)
    assert "overwrite" in again.stderr and len(errors(again)) == 1


def test_calibration_says_what_it_saw(workshop: Workshop) -> None:
    facts, rows = read(workshop.root / "calibrate.json")
    assert facts["tp"] == 2 and not facts["virtual_ranks"]
    assert rows[0]["sync_points"] == 2 * LAYERS and rows[0]["sequences"] == 20 and rows[0]["length"] == 64


@pytest.mark.parametrize("ranks", ["--tp", "--virtual-tp"])
def test_eval_writes_a_row_a_scheme(workshop: Workshop, ranks: str) -> None:
    out = workshop.root / f"eval{ranks}.json"
    done = call(
        "eval", workshop.tp2, "--text", workshop.text, "--schemes", ",".join(SCHEMES), "--windows", 3, "--length", 64,
        "--calibration", workshop.calibration, ranks, 2, "--json", out,
    )  # fmt: skip
    facts, rows = read(out)
    assert facts["tp"] == 2 and facts["virtual_ranks"] == (ranks == "--virtual-tp") and facts["windows"] == 3
    assert [row["scheme"] for row in rows] == SCHEMES
    for row in rows:
        assert list(row)[: len(EVAL_ROW)] == EVAL_ROW
        assert row["tokens"] == 3 * 63 and row["prefill_tokens_per_s"] > 0
        assert row["stages"] == (1 if row["scheme"].endswith("one-stage") else 2)
        assert (row["gather_bits_per_value"] is None) == (row["stages"] == 1)
        assert row["scheme"] in done.stdout
        # at two ranks one stage and two move the same bytes: a row a token and sync point, sent once in the mean
        row_nbytes = row["reduce_bits_per_value"] * HIDDEN / 8
        assert row["sent_nbytes_per_token_per_rank"] == pytest.approx(2 * LAYERS * row_nbytes, rel=1e-9)
    by_name = {row["scheme"]: row for row in rows}
    assert by_name["exact"]["kl_mean"] == 0.0 and by_name["exact"]["top1_agreement"] == 1.0
    assert by_name["exact"]["perplexity_ratio"] == 1.0 and by_name["exact"]["reduce_bits_per_value"] == 32
    assert by_name["int4-outlier"]["reduce_bits_per_value"] == 8 * (64 + 2 * 2) / 128  # 126 codes, padded; 2 outliers
    assert 0 < by_name["bf16"]["kl_mean"] < by_name["int8-group"]["kl_mean"] < by_name["int4-group"]["kl_mean"]


@pytest.mark.parametrize("scheme", ["bf16", "int4-outlier"])
def test_generate_continues_two_prompts(workshop: Workshop, scheme: str) -> None:
    prompts = ["Once upon", "In the beginning there"]
    out = workshop.root / f"generate-{scheme}.json"
    words = ["generate", workshop.tp2, "--scheme", scheme, "--tp", 2, "--max-new-tokens", 6, "--json", out]
    words += [] if scheme == "bf16" else ["--calibration", workshop.calibration]
    done = call(*words, *(word for prompt in prompts for word in ("--prompt", prompt)))
    facts, rows = read(out)
    assert facts["tp"] == 2
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        assert row["scheme"] == scheme and row["new_tokens"] == 6 and row["finish_reason"] == "length"
        assert done.stdout.count(f"--- {row['prompt']}") == 1  # only one of the ranks prints


def test_torchrun_starts_the_ranks_and_no_flag_is_needed(workshop: Workshop) -> None:
    out = workshop.root / "torchrun.json"
    call("generate", workshop.hf, "--prompt", "Once", "--max-new-tokens", 4, "--json", out, torchrun=2)
    facts, rows = read(out)
    assert facts["tp"] == 2 and not facts["virtual_ranks"] and rows[0]["new_tokens"] == 4


def test_a_count_unlike_torchruns_is_refused_once(workshop: Workshop) -> None:
    done = call("generate", workshop.hf, "--prompt", "Once", "--tp", 3, code=2, torchrun=2)
    assert "--tp 3 differs from the 2 ranks torchrun started" in done.stderr


def test_a_missing_calibration_stops_all_ranks_with_one_line(workshop: Workshop) -> None:
    done = call("eval", workshop.tp2, "--text", workshop.text, "--schemes", "int4", "--length", 64, "--tp", 2, code=2)
    (line,) = errors(done)
    assert "megatron-lowbit calibrate" in line and "--calibration" in line
    assert "Traceback" not in done.stderr


def test_a_calibration_for_other_ranks_is_refused(workshop: Workshop) -> None:
    flags = ["--text", workshop.text, "--length", 64, "--calibration", workshop.calibration]
    done = call("eval", workshop.tp2, "--schemes", "int4", *flags, "--virtual-tp", 3, code=2)
    assert "2 tensor-parallel ranks, this run has 3" in errors(done)[0]


def test_bench_times_schemes_beside_torch(workshop: Workshop) -> None:
    out = workshop.root / "bench.json"
    flags = ["--tokens", "1,5", "--hidden", 256, "--schemes", "bf16,int4-outlier:one-stage", "--rounds", 3]
    call("bench", "all-reduce", *flags, "--tp", 2, "--json", out)
    _, rows = read(out)
    names = ["torch.distributed.all_reduce", "bf16", "bf16, policy", "int4-outlier:one-stage"]
    assert [(row["tokens"], row["scheme"]) for row in rows] == [(tokens, name) for tokens in (1, 5) for name in names]
    for row in rows:
        assert list(row)[: len(BENCH_ROW)] == BENCH_ROW
        assert row["hidden"] == 256 and row["tp"] == 2 and 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
    assert all(row["ratio_to_torch_all_reduce"] == 1.0 for row in rows if row["scheme"] == names[0])
