"""What a person or a machine reads: tables, progress bars and JSON files. Only rank 0 prints."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from megatron_lowbit.files import replacing
from megatron_lowbit.parallel import ParallelContext

ProgressCallback = Callable[[int, int], None]
Row = Mapping[str, Any]


def console(context: ParallelContext | None = None) -> Console:
    """Prints on rank 0, nowhere else. Tables keep their width where the output is no terminal."""
    quiet = context is not None and not context.is_first
    return Console(quiet=quiet, width=None if sys.stdout.isatty() else 150, highlight=False)


@contextmanager
def progress_bar(what: str, context: ParallelContext | None = None) -> Iterator[ProgressCallback]:
    """A bar with count, time spent and time left on stderr; a line every tenth where stderr is no terminal."""
    with _bar(what, context, MofNCompleteColumn()) as report:
        yield report


@contextmanager
def byte_progress_bar(what: str) -> Iterator[ProgressCallback]:
    """The same for bytes, with bytes a second."""
    with _bar(what, None, DownloadColumn(), TransferSpeedColumn()) as report:
        yield report


@contextmanager
def _bar(what: str, context: ParallelContext | None, *counts: ProgressColumn) -> Iterator[ProgressCallback]:
    if context is not None and not context.is_first:
        yield lambda done, total: None
        return
    if not sys.stderr.isatty():
        yield _lines(what)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), *counts, TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _lines(what: str) -> ProgressCallback:
    last = -1

    def report(done: int, total: int) -> None:
        nonlocal last
        tenth = 10 * done // total if total else 10
        if tenth != last:
            last = tenth
            print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)

    return report


def table(title: str, rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]], caption: str) -> Table:
    """A rich table; `columns` maps each heading to how a row's cell reads."""
    built = Table(
        title=title, caption=caption, caption_justify="left", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1)
    )
    for index, heading in enumerate(columns):
        built.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        built.add_row(*(cell(row) for cell in columns.values()))
    return built


def conditions(context: ParallelContext, **more: Any) -> dict[str, Any]:
    """What must be known to compare numbers: hardware, versions, ranks, and whatever the command adds."""
    device = context.device
    return {
        "tp": context.size,
        "virtual_ranks": context.virtual,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({_processor()})",
        "cpu_count": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **more,
    }


def write_json(path: Path | None, context: ParallelContext, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """`{"conditions": …, "rows": […]}`, written beside and renamed, by rank 0; nothing where no path was given."""
    if path is None or not context.is_first:
        return
    written = {"conditions": dict(facts), "rows": [dict(row) for row in rows]}
    with replacing(path) as beside:
        beside.write_text(json.dumps(written, indent=2) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _commit() -> str | None:
    """Commit of the source tree this runs from, with '+' where it was changed; None for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")
