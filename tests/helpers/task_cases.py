"""Small tasks for tiny models: a tokenizer of single characters, files of questions, a case for a RankGroup."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.task_evaluation import evaluate_tasks
from megatron_lowbit.task_questions import read_task
from megatron_lowbit.weights import load_weights

PLACES = ("garden", "attic", "river", "old mill", "market")
#: of nearly one length: a tiny model takes the shortest of others for the likeliest
THINGS = (("a key", "a pot", "an owl"), ("a gun", "a hat"), ("two cats", "old maps", "a letter"))
CHOICES = [
    {"query": f"In the {place} they found", "choices": list(things), "gold": number % len(things)}
    for number, place in enumerate(PLACES)
    for things in THINGS
]
WORDS = [
    {"context": f"What did he look for in the {place}? His", "continuation": f"hat {place[0]}"} for place in PLACES
]


class Characters:
    """A token a character, of a vocabulary of any size; BOS is token 1."""

    adds_bos, bos_id = True, 1

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        return [1] * add_bos + [ord(character) % self.vocab_size for character in text]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rank_evaluate_tasks(
    context: ParallelContext, path: str, calibration: str, schemes: list[str], files: list[str]
) -> dict[str, Any]:
    """Rows without their speed."""
    weights = load_weights(Path(path), context, torch.float32)
    tasks = [read_task(Path(file)) for file in files]
    ranges, encoder = CommCalibration.load(Path(calibration)), Characters(weights.config.vocab_size)
    rows = [row.fields() for row in evaluate_tasks(weights, schemes, tasks, encoder, ranges)]
    return {"rows": [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows]}
