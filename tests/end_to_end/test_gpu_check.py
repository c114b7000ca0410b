"""`launch/gpu_check.sh` on a machine without a GPU: its logic, and that it never passes anything off as measured."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lowbit_tools import gpu_check, gpu_check_timing
from lowbit_tools.gpu_check_work import FORMATS, STEPS

ROOT = Path(__file__).resolve().parents[2]


def launch(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "launch" / "gpu_check.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing():
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    run = launch()
    assert run.returncode == 2
    assert "sees no CUDA device here: nothing was checked and nothing measured" in run.stderr
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before


def test_a_dry_run_goes_through_every_step_and_size(tmp_path):
    run = launch(
        "--dry-run", "--only", "timing", "--formats", "int4-outlier,nvfp4", "--out", tmp_path, "--budget-s", 900
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "DRY RUN, not a measurement" in run.stdout
    (file,) = tmp_path.iterdir()
    written = json.loads(file.read_text())
    assert written["conditions"]["DRY RUN"] == "not a measurement"
    sizes = gpu_check_timing.DRY_SIZES
    expected = {("large", name, step, sizes.large_tokens) for name in ("int4-outlier", "nvfp4") for step in STEPS}
    expected |= {("small", *rest[1:3], tokens) for rest in expected for tokens in sizes.small_tokens}
    assert {(row["kind"], row["format"], row["step"], row["tokens"]) for row in written["rows"]} == expected


def test_a_dry_run_keeps_out_of_the_measurements():
    run = launch("--dry-run", "--out", ROOT / "benchmarks" / "results")
    assert run.returncode == 2
    assert "must not go to benchmarks/" in run.stderr


def test_an_unknown_format_is_an_error():
    run = launch("--dry-run", "--formats", "int4-g64,int5")
    assert (run.returncode, run.stdout) == (2, "")
    assert f"unknown formats int5; known: {', '.join(FORMATS)}" in run.stderr


def test_a_hanging_step_is_ended_with_all_it_started(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time, pathlib\nwhile True:\n    pathlib.Path({str(alive)!r}).touch()\n    time.sleep(0.05)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    began = time.monotonic()
    outcome = gpu_check.run(gpu_check.Step("hangs", [sys.executable, "-c", parent], 3.0), began + 60)
    assert outcome == "took longer than 3 s"
    assert time.monotonic() - began < 20
    assert alive.exists(), "the child never ran"
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists(), "what the step started lives on"


def test_the_steps_after_a_failing_one_run_and_it_is_named(tmp_path, monkeypatch, capsys):
    def steps(dry_run):
        touch = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()"
        return [
            gpu_check.Step("breaks", [sys.executable, "-c", "raise SystemExit(7)"], 20),
            gpu_check.Step("runs", [sys.executable, "-c", touch], 20),
        ]

    monkeypatch.setattr(gpu_check, "test_steps", steps)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--dry-run", "--only", "tests"])
    assert ended.value.code == 1
    assert (tmp_path / "ran").exists()
    assert "step failed: breaks (exit code 7)" in capsys.readouterr().err


def test_nothing_starts_when_the_time_is_up():
    step = gpu_check.Step("late", [sys.executable, "-c", ""], 20)
    assert gpu_check.run(step, time.monotonic() + 0.5) == gpu_check.NO_TIME


def test_bytes_that_must_move_are_counted_by_hand():
    """4 tokens of 128 values, INT4 in groups of 64: a row is 64 bytes of codes and 2 scales of 2 bytes."""
    layout = gpu_check_timing.layout_of("int4-g64", 128)
    assert layout.row_nbytes == 68
    work = gpu_check_timing.Work(layout, 4, gpu_check_timing.get_backend("torch"), torch.device("cpu"), sets=1)
    packet, values = 4 * 68, 4 * 128 * 4
    assert {step.name: step.nbytes for step in work.steps()} == {
        "encode": 4 * 128 * 2 + packet,
        "decode": packet + values,
        "decode_add": packet + 2 * values,
        "decode_sum": 4 * packet + values,
        "requantize": 4 * packet + packet,
        "decode_add_norm": packet + 2 * values + 4 * 128 * 2 + 128 * 4,
    }


def test_a_wrong_kernel_is_found_before_it_is_timed():
    class Wrong:
        def __getattr__(self, name):
            return getattr(gpu_check_timing.get_backend("torch"), name)

        def decode_sum(self, packets_RTB, layout, out_TH, *static):
            gpu_check_timing.get_backend("torch").decode_sum(packets_RTB[:-1], layout, out_TH, *static)

    layout = gpu_check_timing.layout_of("int4-g64", 128)
    gpu_check_timing.Work(layout, 4, gpu_check_timing.get_backend("torch"), torch.device("cpu"), sets=1).check()
    with pytest.raises(AssertionError, match=r"decode_sum of .*: out is not what the reference gives"):
        gpu_check_timing.Work(layout, 4, Wrong(), torch.device("cpu"), sets=1).check()
