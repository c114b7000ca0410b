"""reshard: a checkpoint of ours for one number of ranks -> the same for another, without the original."""

from __future__ import annotations

from pathlib import Path

from checkpoints_conv.convert import ConversionSummary, convert
from megatron_lowbit.checkpoint.manifest import MANIFEST_FILE, Progress


def reshard(
    source: Path, out: Path, tp: int, progress: Progress | None = None, overwrite: bool = False
) -> ConversionSummary:
    """`convert` of one of our checkpoints, its type kept: every value stays bit for bit. Raises as `convert` does."""
    if source.is_dir() and not (source / MANIFEST_FILE).is_file():
        raise ValueError(f"{source}: not a converted checkpoint; reshard takes one of ours, convert takes others")
    if source.is_file():
        raise ValueError(f"{source}: a file, expected the folder of a converted checkpoint; convert takes others")
    return convert(source, out, tp, None, progress, overwrite)
