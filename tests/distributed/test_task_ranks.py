"""Answers over real ranks: the same rows on all of them, and those of virtual ranks, however the vocabulary is cut."""

from __future__ import annotations

import pytest
import torch
from helpers.model_cases import prompt_of
from helpers.task_cases import CHOICES, WORDS, Characters, rank_evaluate_tasks, write_lines

from megatron_lowbit.calibration_run import calibrate
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.task_evaluation import evaluate_tasks
from megatron_lowbit.task_questions import read_task
from megatron_lowbit.weights import load_weights


# at 5 ranks "sparse" has one without any token
@pytest.mark.parametrize("variant, size", [("odd", 2), ("sparse", 5)])
def test_tasks_equal_those_of_virtual_ranks(ranks, tiny_models, tmp_path, variant, size):
    path, schemes = tiny_models(variant), ["bf16", "int8-group", "int4-outlier"]
    weights = load_weights(path, ParallelContext.virtual_ranks(size), torch.float32)
    vocabulary = weights.config.vocab_size
    calibration = calibrate(weights, [prompt_of(vocabulary, 24, start) for start in range(3)], "0" * 64)
    calibration.save(tmp_path / "calibration.safetensors")
    rows = {"things": CHOICES, "hats": WORDS}
    files = [write_lines(tmp_path / f"{name}.jsonl", lines) for name, lines in rows.items()]
    tasks = [read_task(file) for file in files]
    expected = evaluate_tasks(weights, schemes, tasks, Characters(vocabulary), calibration)
    results = ranks(size).run(
        rank_evaluate_tasks, path=str(path), calibration=str(tmp_path / "calibration.safetensors"), schemes=schemes,
        files=[str(file) for file in files],
    )  # fmt: skip
    for result in results:
        assert result["rows"] == results[0]["rows"], "every rank reports the same row"
    for row, of_virtual in zip(results[0]["rows"], expected, strict=True):
        for field in ("task", "kind", "scheme", "metric", "questions", "tokens"):
            assert row[field] == getattr(of_virtual, field)
        if row["scheme"] == "bf16":  # one step of a code may decide an answer
            assert row["score"] == pytest.approx(of_virtual.score.mean) and row["flips"] == of_virtual.flips.flips
        # Rounding of a partial can turn a code into its neighbour: one step in thousands of values, hence a percent.
        assert row["log_likelihood"] == pytest.approx(of_virtual.log_likelihood, rel=0.02)
