"""convert: any checkpoint that can be read -> a tensor-parallel checkpoint, a block of rows at a time."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints_conv.companions import hf_config_of, write_companions, write_hf_config
from checkpoints_conv.rank_files import RankSummary, rank_summary, write_rank_files
from checkpoints_conv.source import open_source, rounding_notes, stored_dtype
from checkpoints_conv.staging import staged_directory
from megatron_lowbit.checkpoint.huggingface import HuggingFaceCheckpoint
from megatron_lowbit.checkpoint.manifest import (
    DTYPES,
    MANIFEST_FILE,
    MAX_TP,
    FileRecord,
    Manifest,
    Progress,
    sha256_of,
)
from megatron_lowbit.checkpoint.reader import CheckpointReader, check_complete
from megatron_lowbit.checkpoint.tensor_parallel import CONFIG_FILE, HF_CONFIG_FILE, TensorParallelCheckpoint
from megatron_lowbit.models.registry import tensor_sources


@dataclass(frozen=True)
class ConversionSummary:
    """What was written to `out`; `other_files`: config, tokenizer and licence files. notes: what a user should know."""

    out: Path
    source: str
    dtype: str
    ranks: tuple[RankSummary, ...]
    other_files: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(rank.nbytes for rank in self.ranks)


def convert(
    source: Path,
    out: Path,
    tp: int,
    dtype: torch.dtype | None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> ConversionSummary:
    """Writes `source` (Hugging Face folder, GGUF file, or one of our checkpoints) to the folder `out` for `tp` ranks.

    dtype: torch.bfloat16, torch.float16 (both round to nearest even) or torch.float32; None for the stored one. Memory:
    some blocks of 4 MiB whatever the model, and one tensor where the source keeps it transposed or interleaved.
    `out` appears complete or not at all. overwrite: replace one of our own checkpoints at `out`; nothing else is.
    Raises FileNotFoundError or ValueError: arguments, a damaged or incomplete source, a weight that is not finite.
    """
    _check_arguments(source, out, tp, dtype, overwrite)
    reader = open_source(source)
    sources = tensor_sources(reader.config)
    check_complete(reader, sources)
    if isinstance(reader, TensorParallelCheckpoint):
        reader.verify_hashes()  # or the damage would get a sum of its own
    dtype = dtype or stored_dtype(reader, sources)
    ranks = tuple(rank_summary(sources, rank, tp, dtype) for rank in range(tp))
    check_space(out, sum(rank.nbytes for rank in ranks))
    with staged_directory(out) as staging:
        # first: what can fail, fails before the long work
        others = write_companions(reader, staging)
        write_hf_config(staging / HF_CONFIG_FILE, hf_config_of(reader))
        (staging / CONFIG_FILE).write_text(reader.config.to_json())
        others = [CONFIG_FILE, HF_CONFIG_FILE, *others]
        files = write_rank_files(reader, sources, staging, tp, dtype, progress)
        files |= {name: FileRecord(sha256_of(staging / name), (staging / name).stat().st_size) for name in others}
        # last, since a folder without it does not load
        dtype_name = next(name for name, known in DTYPES.items() if known == dtype)
        manifest = Manifest(tp, dtype_name, source.resolve().name, files)
        (staging / MANIFEST_FILE).write_text(manifest.to_json())
    notes = (*rounding_notes(reader, sources, dtype), *_left_out(reader))
    return ConversionSummary(out, manifest.source, dtype_name, ranks, tuple(others), notes)


def _left_out(reader: CheckpointReader) -> list[str]:
    if not isinstance(reader, HuggingFaceCheckpoint) or not reader.left_out:
        return []
    parts = sorted({name.removeprefix("model.").partition(".")[0] for name in reader.left_out})
    return [f"{len(reader.left_out)} tensors that are not of the language model were left out ({', '.join(parts)})"]


def _check_arguments(source: Path, out: Path, tp: int, dtype: torch.dtype | None, overwrite: bool) -> None:
    """Raises ValueError for anything that could not end well."""
    if not 1 <= tp <= MAX_TP:
        raise ValueError(f"tensor-parallel size is {tp}; it must lie between 1 and {MAX_TP}")
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype {dtype} is not supported for weights; supported: {', '.join(DTYPES)}")
    check_place(source, out)
    if out.is_dir() and any(out.iterdir()):
        _check_replaceable(out, overwrite)


def check_place(source: Path, out: Path) -> None:
    """Raises ValueError where `out` is a file, or source and output lie inside each other."""
    inner, outer = out.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ValueError(f"{out}: source {source} and output lie inside each other; give another place for the output")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file is there; give the name of a new folder")


def _check_replaceable(out: Path, overwrite: bool) -> None:
    """Raises ValueError unless the folder is one of our checkpoints, holds nothing else, and may be overwritten."""
    if not (out / MANIFEST_FILE).is_file():
        raise ValueError(f"{out}: the folder is not empty and not a converted checkpoint; give a new folder")
    strangers = {path.name for path in out.iterdir()} - {MANIFEST_FILE, *Manifest.read(out).files}
    if not overwrite:
        raise ValueError(
            f"{out}: a converted checkpoint is there already; give a new folder, or overwrite it (--overwrite)"
        )
    if strangers:
        raise ValueError(f"{out}: {min(strangers)} is not part of the checkpoint to overwrite; move it away first")


def check_space(out: Path, nbytes: int) -> None:
    """Raises ValueError where the disk has no room for so many bytes."""
    existing = next(parent for parent in out.resolve().parents if parent.exists())
    free_nbytes = shutil.disk_usage(existing).free
    if free_nbytes < nbytes:
        raise ValueError(f"{out}: the weights take {nbytes:,} bytes and {free_nbytes:,} are free; make room first")
