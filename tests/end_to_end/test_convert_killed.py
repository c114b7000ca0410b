"""A conversion that is killed at any time leaves nothing that loads, and the next one cleans up and succeeds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from helpers.stored_checkpoints import hf_config, write_checkpoint

from checkpoints_conv.convert import convert
from checkpoints_conv.staging import staged_directory
from megatron_lowbit.checkpoint.open import open_checkpoint
from megatron_lowbit.checkpoint.tensor_parallel import TensorParallelCheckpoint

# one process converts again and again, so that a kill falls into the work and not into imports
CHILD = """
import sys
from pathlib import Path
import torch
from checkpoints_conv.convert import convert
print("ready", flush=True)
while True:
    convert(Path(sys.argv[1]), Path(sys.argv[2]), 3, torch.bfloat16, overwrite=True)
"""


def test_killed_at_random_times(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", hf_config("llama", hidden_size=96, intermediate_size=300, vocab_size=900))
    out, dice = tmp_path / "work" / "out", random.Random(3)
    out.parent.mkdir()
    left_behind = 0
    for _ in range(6):
        child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path / "hf", out], stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            time.sleep(dice.uniform(0.0, 0.15))
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        left = [path for path in out.parent.iterdir() if path != out]
        left_behind += len(left)
        for path in left:
            assert path.name.startswith(".out.partial-")
            try:
                opened = open_checkpoint(path)
            except (ValueError, FileNotFoundError):
                continue
            # killed between its last byte and its name, or about to be removed: then it is whole
            assert isinstance(opened, TensorParallelCheckpoint)
            opened.verify_hashes()
        if out.exists():
            TensorParallelCheckpoint(out).verify_hashes()
    assert left_behind, "no kill fell into a conversion: the test shows nothing"
    convert(tmp_path / "hf", out, 2, torch.bfloat16, overwrite=True)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert TensorParallelCheckpoint(out).tp == 2


def test_folders_of_runs_that_go_on_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    others = [tmp_path / ".out.partial-0badcafe", tmp_path / ".out2.partial-0badcafe", tmp_path / "out.partial-x"]
    for other in others:
        other.mkdir()
        (other / "half").write_text("")
    with staged_directory(out) as first:
        (first / "a").write_text("")
        with staged_directory(out) as second:
            assert first.is_dir() and second != first
            (second / "b").write_text("")
        assert first.is_dir() and os.listdir(out) == ["b"]
        assert not others[0].exists() and others[1].exists() and others[2].exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out2.partial-0badcafe", "out", "out.partial-x"]
    assert os.listdir(out) == ["a"]
