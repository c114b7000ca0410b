"""Staged folder: a folder that appears under its name complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """Yields a new folder beside `out`, renamed to `out` when the block ends well and removed when it does not.

    A folder that is already at `out` is replaced as a whole, so the caller decides beforehand that it may be.
    Raises ValueError where no folder can be made.
    """
    out = out.resolve()
    staging = out.parent / f".{out.name}.partial-{secrets.token_hex(4)}"
    try:
        staging.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{out.parent}: not a folder ({error.strerror}); give another place for the output") from error
    try:
        yield staging
        _swap(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
