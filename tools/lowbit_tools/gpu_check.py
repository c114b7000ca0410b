"""Checks and times the kernels on the GPU of this machine, in one go: `launch/gpu_check.sh`.

Every step is a process of its own with a limit in time, so that neither a hang nor a crash costs the others. A bare
machine is enough: a checkout, torch with CUDA and Triton; pytest for the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit_tools.gpu_check_work import FORMATS, STEPS
from megatron_lowbit.files import replacing

ROOT = Path(__file__).resolve().parents[2]
#: Files with tests that carry the marker `gpu`, most telling first, and the seconds each may take.
TEST_FILES = (
    ("tests/parity/test_kernels_parity.py", 130),
    ("tests/parity/test_cuda_graphs.py", 80),
    ("tests/parity/test_ops.py", 80),
    ("tests/distributed/test_symmetric.py", 80),
)
#: A format may take the first; the second is kept back for each while what comes before it runs.
TIMING_S, KEPT_S = 45, 20
WARM_UP_S = 120
DRY_RUN_S = 600  # however slow this machine is, it is the logic that is tried
#: What steps say when they were not run, told apart from a failure.
NO_TIME = "no time left"


@dataclass(frozen=True)
class Step:
    """One child process. `name` is what the summary calls it."""

    name: str
    command: list[str]
    limit_s: float


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu_check", description="Checks and times the kernels on this GPU.")
    parser.add_argument("--out", type=Path, help="folder of the JSON rows (default: benchmarks/results)")
    parser.add_argument("--budget-s", type=float, default=460, help="seconds for everything (default: 460)")
    parser.add_argument("--only", choices=("tests", "timing"), help="leave the other part out")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"of the timing (default: {','.join(FORMATS)})")
    parser.add_argument("--dry-run", action="store_true", help="try this script's logic on a CPU; measures nothing")
    args = parser.parse_args(argv)
    sys.exit(check(args))


def check(args: argparse.Namespace) -> int:
    """Runs all steps; returns the exit code: 0, 1 where a step failed, 2 where nothing could run."""
    began = time.monotonic()
    formats = args.formats.split(",")
    if unknown := [name for name in formats if name not in FORMATS]:
        print(f"gpu_check: unknown formats {', '.join(unknown)}; known: {', '.join(FORMATS)}", file=sys.stderr)
        return 2
    if (
        args.dry_run
        and args.out is not None
        and (ROOT / "benchmarks") in (args.out.resolve(), *args.out.resolve().parents)
    ):
        print("gpu_check: a dry run measures nothing, so its rows must not go to benchmarks/", file=sys.stderr)
        return 2
    facts = conditions(args.dry_run)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    if not args.dry_run and not torch.cuda.is_available():
        print(
            f"gpu_check: torch {torch.__version__} sees no CUDA device here: nothing was checked and nothing measured. "
            "--dry-run tries this script's logic on a CPU.",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        rows_file = Path(folder) / "rows.jsonl"
        rows_file.touch()
        tests = [] if args.only == "timing" else test_steps(args.dry_run)
        timings = [] if args.only == "tests" else [timing_step(name, rows_file, args.dry_run) for name in formats]
        if timings:
            tests.insert(0, warm_up_step(formats, args.dry_run))
        deadline = began + args.budget_s
        outcomes = {step.name: run(step, deadline - KEPT_S * len(timings)) for step in tests}
        outcomes |= {step.name: run(step, deadline) for step in timings}
        rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    failed = {name: outcome for name, outcome in outcomes.items() if outcome}
    facts["seconds"] = round(time.monotonic() - began, 1)
    facts["failed_steps"] = failed
    if rows:
        print(f"\n{tables(rows, formats, facts)}")
        out = args.out or (None if args.dry_run else ROOT / "benchmarks" / "results")
        if out is not None:
            print(f"rows written to {write_rows(out, facts, rows)}")
    for name, outcome in failed.items():
        print(f"gpu_check: step failed: {name} ({outcome})", file=sys.stderr)
    if not failed:
        print(f"gpu_check: all {len(outcomes)} steps passed in {facts['seconds']} s")
    return 1 if failed else 0


def conditions(dry_run: bool) -> dict[str, Any]:
    """What must be known to compare numbers."""
    cuda = torch.cuda.is_available()
    facts = {
        "device": torch.cuda.get_device_name() if cuda else f"no GPU ({platform.machine()})",
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())) if cuda else None,
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count if cuda else None,
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    return {"DRY RUN": "not a measurement", **facts} if dry_run else facts


def test_steps(dry_run: bool) -> list[Step]:
    """One step a file; on a dry run pytest only collects the tests."""
    steps = []
    for path, limit_s in TEST_FILES:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", path]
        # what pyproject.toml asks of pytest names plugins that a bare machine may lack
        command += ["-o", "addopts=--import-mode=importlib -ra --strict-markers"]
        if importlib.util.find_spec("xdist") is not None and not dry_run and "distributed" not in path:
            command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]  # most of the time Triton compiles
        steps.append(Step(f"gpu tests of {Path(path).stem}", command + ["--collect-only"] * dry_run, limit_s))
    return steps


def timing_step(name: str, rows_file: Path, dry_run: bool) -> Step:
    command = [sys.executable, "-m", "lowbit_tools.gpu_check_timing", "--format", name, "--rows", str(rows_file)]
    return Step(f"timing of {name}", command + ["--dry-run"] * dry_run, DRY_RUN_S if dry_run else TIMING_S)


def warm_up_step(formats: list[str], dry_run: bool) -> Step:
    """Compiles what will be timed, and compares it with the reference on the way."""
    command = [sys.executable, "-m", "lowbit_tools.gpu_check_timing", "--warm-up"]
    for name in formats:
        command += ["--format", name]
    return Step("compiling what will be timed", command + ["--dry-run"] * dry_run, DRY_RUN_S if dry_run else WARM_UP_S)


def run(step: Step, deadline: float) -> str:
    """An empty string where the step went well, else what went wrong. Its output goes to this process's."""
    limit_s = min(step.limit_s, deadline - time.monotonic())
    if limit_s < 1:
        return NO_TIME
    if "pytest" in step.command and importlib.util.find_spec("pytest") is None:
        return f"pytest is not installed for {sys.executable}"
    print(f"\n== {step.name} (at most {limit_s:.0f} s)", flush=True)
    began = time.monotonic()
    # a session of its own, so that whatever it started ends with it
    process = subprocess.Popen(step.command, cwd=ROOT, start_new_session=True, stdin=subprocess.DEVNULL)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"took longer than {limit_s:.0f} s"
    finally:
        _end_session(process)
    print(f"== {time.monotonic() - began:.1f} s", flush=True)
    if "pytest" in step.command and code == 5:
        return "pytest found no test that carries the marker gpu"
    return f"exit code {code}" if code else ""


def _end_session(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tables(rows: list[dict[str, Any]], formats: list[str], facts: dict[str, Any]) -> str:
    """Large messages as a share of what a copy of as many bytes reaches; small ones in microseconds a launch."""
    found = {(row["kind"], row["format"], row["step"], row["tokens"]): row for row in rows}
    width = max(map(len, formats)) + 2
    lines = []
    for kind in ("large", "small"):
        sizes = sorted({row["tokens"] for row in rows if row["kind"] == kind})
        for tokens in sizes:
            hidden = next(row["hidden"] for row in rows if row["kind"] == kind)
            what = "share of the copy's bandwidth" if kind == "large" else "us in a graph (elementwise of equal bytes)"
            lines += ["", f"[{tokens}, {hidden}]: {what}", " " * 16 + "".join(f"{name:>{width}}" for name in formats)]
            for step in STEPS:
                cells = [_cell(found.get((kind, name, step, tokens))) for name in formats]
                lines.append(f"{step:16}" + "".join(f"{cell:>{width}}" for cell in cells))
    versions = f"torch {facts['torch']}, triton {facts['triton']}"
    title = f"{facts['device']}, {versions}, {facts['date']}, commit {facts['commit']}"
    if "DRY RUN" in facts:
        title = f"DRY RUN, not a measurement: {title}"
    return "\n".join([title, *lines[1:]])


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["kind"] == "large":
        return f"{100 * row['base_over_ours']:.0f} %"
    return f"{row['median_us']:.1f} ({row['base_median_us']:.1f})"


def write_rows(out: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    path = out / f"{facts['date'][:10]}-gpu-check-{device}.json"
    with replacing(path) as beside:
        beside.write_text(json.dumps({"conditions": facts, "rows": rows}, indent=1) + "\n")
    return path


def _output(command: list[str]) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip().splitlines()[0] if run.stdout.strip() else None


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return str(importlib.import_module(package).__version__)


if __name__ == "__main__":
    main()
