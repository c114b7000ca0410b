"""Staged folder: a folder that appears under its name complete or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """Yields a new folder beside `out`, renamed to `out` when the block ends well and removed when it does not.

    A folder that is already at `out` is replaced as a whole, so the caller decides beforehand that it may be. Folders
    that runs for the same `out` left behind when they were killed are removed; those of runs that still go on are not.
    Raises ValueError where no folder can be made.
    """
    out = out.resolve()
    prefix = f".{out.name}.partial-"
    staging = out.parent / f"{prefix}{secrets.token_hex(4)}"
    try:
        staging.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{out.parent}: not a folder ({error.strerror}); give another place for the output") from error
    lock = _locked(staging)
    try:
        _remove_abandoned(out.parent, prefix, staging)
        yield staging
        _swap(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor whose lock ends with the process, however that ends; None where another has it, or none can tell."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(parent: Path, prefix: str, own: Path) -> None:
    for folder in parent.iterdir():
        if not folder.name.startswith(prefix) or folder == own or not folder.is_dir():
            continue
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _swap(staging: Path, out: Path) -> None:
    if not out.is_dir() or not any(out.iterdir()):
        os.rename(staging, out)
        return
    retired = staging.with_name(staging.name + ".old")
    os.rename(out, retired)
    try:
        os.rename(staging, out)
    except OSError:
        os.rename(retired, out)
        raise
    shutil.rmtree(retired, ignore_errors=True)
