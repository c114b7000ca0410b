"""convert: any checkpoint that can be read -> a tensor-parallel checkpoint, a block of rows at a time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints_conv.gguf_reader import GGUFCheckpoint
from checkpoints_conv.gguf_tokenizer import write_tokenizer
from checkpoints_conv.staging import staged_directory
from checkpoints_conv.streaming_writer import StreamingSafetensorsWriter
from megatron_lowbit.checkpoint.manifest import DTYPES, MANIFEST_FILE, FileRecord, Manifest, Progress, sha256_of
from megatron_lowbit.checkpoint.open import is_gguf, open_checkpoint
from megatron_lowbit.checkpoint.reader import CheckpointReader, check_complete
from megatron_lowbit.checkpoint.tensor_parallel import CONFIG_FILE, TensorParallelCheckpoint, rank_file_name
from megatron_lowbit.models.registry import tensor_sources
from megatron_lowbit.sharding import TensorSource

MAX_TP = 512  # one open file a rank
BLOCK_NBYTES = 32 << 20
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
COPIED_PATTERNS = ("LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class RankSummary:
    """`tensors` counts those of which the rank holds something; `nbytes` is the size of its file."""

    rank: int
    file: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class ConversionSummary:
    """What was written to `out`; `other_files`: config, tokenizer and licence files."""

    out: Path
    source: str
    dtype: str
    ranks: tuple[RankSummary, ...]
    other_files: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(rank.nbytes for rank in self.ranks)


def open_source(path: Path) -> CheckpointReader:
    """`open_checkpoint`, and GGUF files as well."""
    if path.is_file() and is_gguf(path):
        return GGUFCheckpoint(path)
    return open_checkpoint(path)


def convert(
    source: Path,
    out: Path,
    tp: int,
    dtype: torch.dtype,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> ConversionSummary:
    """Writes `source` (Hugging Face folder, GGUF file, or one of our checkpoints) to the folder `out` for `tp` ranks.

    dtype: torch.bfloat16 (round to nearest even) or torch.float32. Memory: a few blocks of 32 MiB, whatever the model.
    `out` appears complete or not at all. overwrite: replace one of our own checkpoints at `out`; nothing else is.
    Raises FileNotFoundError or ValueError: arguments, a damaged or incomplete source, a weight that is not finite.
    """
    dtype_name = _check_arguments(source, out, tp, dtype, overwrite)
    reader = open_source(source)
    sources = tensor_sources(reader.config)
    check_complete(reader, sources)
    if isinstance(reader, TensorParallelCheckpoint):
        reader.verify_hashes()  # or the damage would get a sum of its own
    total_nbytes = sum(_shard_nbytes(entry, rank, tp, dtype) for entry in sources.values() for rank in range(tp))
    _check_space(out, total_nbytes)
    with staged_directory(out) as staging:
        companions = _write_companions(reader, staging)  # first: what can fail, fails before the long work
        files = _write_rank_files(reader, sources, staging, tp, dtype, total_nbytes, progress)
        ranks = tuple(
            RankSummary(
                rank,
                name,
                sum(_shard_nbytes(entry, rank, tp, dtype) > 0 for entry in sources.values()),
                record.nbytes,
            )
            for rank, (name, record) in enumerate(files.items())
        )
        (staging / CONFIG_FILE).write_text(reader.config.to_json())
        others = (CONFIG_FILE, *companions)
        files |= {name: FileRecord(sha256_of(staging / name), (staging / name).stat().st_size) for name in others}
        # last, since a folder without it does not load
        manifest = Manifest(tp, dtype_name, source.resolve().name, files)
        (staging / MANIFEST_FILE).write_text(manifest.to_json())
    return ConversionSummary(out, manifest.source, dtype_name, ranks, others)


def _write_rank_files(
    reader: CheckpointReader,
    sources: Mapping[str, TensorSource],
    directory: Path,
    tp: int,
    dtype: torch.dtype,
    total_nbytes: int,
    progress: Progress | None,
) -> dict[str, FileRecord]:
    """Streams all tensors, in the order of `sources`, into the `tp` rank files at once."""
    done_nbytes = 0
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                StreamingSafetensorsWriter(
                    directory / rank_file_name(rank, tp),
                    {name: source.shard_shape(rank, tp) for name, source in sources.items()},
                    dtype,
                )
            )
            for rank in range(tp)
        ]
        for source in sources.values():
            for first_row, block in _row_blocks(reader, source):
                converted = block.to(dtype)
                _check_finite(reader, source.name, block, converted)
                for rank, writer in enumerate(writers):
                    piece = _part_of_rank(source, converted, first_row, rank, tp)
                    writer.append(source.name, piece)
                    done_nbytes += piece.numel() * dtype.itemsize
                if progress is not None:
                    progress(done_nbytes, total_nbytes)
        return {rank_file_name(rank, tp): writer.finish() for rank, writer in enumerate(writers)}


def _row_blocks(reader: CheckpointReader, source: TensorSource) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of the full tensor, in order."""
    row_nbytes = math.prod(source.shape[1:]) * torch.float32.itemsize
    count = max(1, BLOCK_NBYTES // row_nbytes)
    for first_row in range(0, source.shape[0], count):
        stop = min(first_row + count, source.shape[0])
        yield first_row, reader.read_span(source.name, 0, first_row, stop)


def _part_of_rank(source: TensorSource, block: torch.Tensor, first_row: int, rank: int, tp: int) -> torch.Tensor:
    """What `rank` holds of a block of rows that starts at `first_row` of the full tensor."""
    rule = source.rule
    if rule.dim is None:
        return block
    start, stop = rule.span(rank, tp)
    if rule.dim > 0:
        return block.narrow(rule.dim, start, stop - start)
    start, stop = max(start - first_row, 0), min(stop - first_row, block.shape[0])
    return block[start : max(start, stop)]


def _check_finite(reader: CheckpointReader, name: str, block: torch.Tensor, converted: torch.Tensor) -> None:
    if not bool(torch.isfinite(converted).all()):
        bad = int((~torch.isfinite(converted)).sum())
        overflow = " after conversion (they were finite before)" if bool(torch.isfinite(block).all()) else ""
        raise ValueError(
            f"{reader.directory}: tensor {name} holds {bad} values that are NaN or infinite{overflow}; "
            "the checkpoint is damaged or was saved from a diverged run"
        )


def _shard_nbytes(source: TensorSource, rank: int, tp: int, dtype: torch.dtype) -> int:
    return math.prod(source.shard_shape(rank, tp)) * dtype.itemsize


def _write_companions(reader: CheckpointReader, directory: Path) -> list[str]:
    """Tokenizer, generation settings and licence; names of what was written."""
    if isinstance(reader, GGUFCheckpoint):
        # a licence beside a lone file may be another file's, so none is taken along
        return write_tokenizer(reader.path, directory)
    found = [reader.directory / name for name in COPIED_FILES]
    for pattern in COPIED_PATTERNS:
        found += sorted(reader.directory.glob(pattern))
    written = [path.name for path in found if path.is_file()]
    for name in written:
        shutil.copyfile(reader.directory / name, directory / name)
    return written


def _check_arguments(source: Path, out: Path, tp: int, dtype: torch.dtype, overwrite: bool) -> str:
    """Name of the dtype. Raises ValueError for anything that could not end well."""
    if not 1 <= tp <= MAX_TP:
        raise ValueError(f"tensor-parallel size is {tp}; it must lie between 1 and {MAX_TP}")
    names = [name for name, known in DTYPES.items() if known == dtype]
    if not names:
        raise ValueError(f"dtype {dtype} is not supported for weights; supported: {', '.join(DTYPES)}")
    inner, outer = out.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ValueError(f"{out}: source {source} and output lie inside each other; give another place for the output")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: a file is there; give the name of a new folder")
    if out.is_dir() and any(out.iterdir()):
        _check_replaceable(out, overwrite)
    return names[0]


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


def _check_space(out: Path, nbytes: int) -> None:
    existing = next(parent for parent in out.resolve().parents if parent.exists())
    free_nbytes = shutil.disk_usage(existing).free
    if free_nbytes < nbytes:
        raise ValueError(f"{out}: the weights take {nbytes:,} bytes and {free_nbytes:,} are free; make room first")
