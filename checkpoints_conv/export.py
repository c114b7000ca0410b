"""export: any checkpoint that can be read -> a Hugging Face folder that transformers loads, bit for bit."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_conv.companions import hf_config_of, write_companions, write_hf_config
from checkpoints_conv.convert import check_place, check_space
from checkpoints_conv.hf_config import config_to_hf
from checkpoints_conv.lanes import Lanes
from checkpoints_conv.rank_files import lane_count
from checkpoints_conv.source import open_source, rounding_notes, stored_dtype
from checkpoints_conv.staging import staged_directory
from checkpoints_conv.stored_tensors import stored_pieces, stored_shapes
from checkpoints_conv.streaming_writer import StreamingSafetensorsWriter
from megatron_lowbit.checkpoint.huggingface import CONFIG_FILE, TEXT_CONFIG
from megatron_lowbit.checkpoint.manifest import DTYPES, Progress
from megatron_lowbit.checkpoint.reader import CheckpointReader, check_complete
from megatron_lowbit.checkpoint.tensor_parallel import TensorParallelCheckpoint
from megatron_lowbit.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE
from megatron_lowbit.models.registry import stored_parts, tensor_sources

MAX_SHARD_NBYTES = 5_000_000_000


@dataclass(frozen=True)
class ExportedFile:
    """One weight file; nbytes is its size."""

    file: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class ExportSummary:
    """What was written to `out`; `other_files`: config, tokenizer and licence. notes: what a user should know."""

    out: Path
    dtype: str
    files: tuple[ExportedFile, ...]
    other_files: tuple[str, ...]
    notes: tuple[str, ...]


def export(
    source: Path,
    out: Path,
    max_shard_nbytes: int = MAX_SHARD_NBYTES,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> ExportSummary:
    """Writes `source` (one of our checkpoints, or anything else that `convert` reads) to the new folder `out`.

    Weights: model.safetensors, or several files with an index where they take more than `max_shard_nbytes` (a tensor
    larger than that has a file of its own). dtype: None for the stored one. Memory: some blocks of 4 MiB, and one
    tensor where the family keeps it transposed or interleaved. `out` appears complete or not at all.
    Raises FileNotFoundError or ValueError: arguments, a damaged or incomplete source, a weight that is not finite.
    """
    if max_shard_nbytes < 1:
        raise ValueError(f"the largest file is {max_shard_nbytes} bytes; it must have at least 1")
    check_place(source, out)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: the folder is not empty; give a new folder")
    reader = open_source(source)
    sources = tensor_sources(reader.config)
    check_complete(reader, sources)
    if isinstance(reader, TensorParallelCheckpoint):
        reader.verify_hashes()
    dtype = dtype or stored_dtype(reader, sources)
    shapes = stored_shapes(sources, stored_parts(reader.config))
    shards = _shards(shapes, dtype, max_shard_nbytes)
    check_space(out, sum(map(math.prod, shapes.values())) * dtype.itemsize)
    with staged_directory(out) as staging:
        others = [CONFIG_FILE, *write_companions(reader, staging)]
        write_hf_config(staging / CONFIG_FILE, _exported_config(reader, dtype))
        files = _write_shards(reader, shards, staging, dtype, progress)
        if len(shards) > 1:
            others.append(INDEX_FILE)
            _write_index(staging / INDEX_FILE, shards, dtype)
    dtype_name = next(name for name, known in DTYPES.items() if known == dtype)
    return ExportSummary(out, dtype_name, files, tuple(others), tuple(rounding_notes(reader, sources, dtype)))


def _exported_config(reader: CheckpointReader, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the language model alone, in the exported type."""
    hf = dict(hf_config_of(reader))
    if TEXT_CONFIG in hf:
        hf = config_to_hf(reader.config)  # what stood around it speaks of tensors that are not here
    hf.pop("quantization_config", None)
    # transformers calls it `dtype` since its version 5, and still reads the older name
    for key in ("dtype", "torch_dtype"):
        if key in hf or (key == "torch_dtype" and "dtype" not in hf):
            hf[key] = str(dtype).removeprefix("torch.")
    return hf


def _shards(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, max_nbytes: int
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Tensors by file, in order, a new file wherever the next tensor would make it too large."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and filled + nbytes > max_nbytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += nbytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors": group for index, group in enumerate(groups)}


def _write_shards(
    reader: CheckpointReader,
    shards: dict[str, dict[str, tuple[int, ...]]],
    directory: Path,
    dtype: torch.dtype,
    progress: Progress | None,
) -> tuple[ExportedFile, ...]:
    parts = stored_parts(reader.config)
    total_nbytes = sum(math.prod(shape) for shard in shards.values() for shape in shard.values()) * dtype.itemsize
    files = []
    with ExitStack() as stack:
        open_files = stack.enter_context(ExitStack())  # closed after the lanes, when no job can write any more
        lanes = stack.enter_context(Lanes(lane_count(1)))
        for file_name, shapes in shards.items():
            path = directory / file_name
            writer = open_files.enter_context(StreamingSafetensorsWriter(path, shapes, dtype, lanes, 0))
            for name in shapes:
                for piece in stored_pieces(reader, name, parts, dtype):
                    writer.append(name, piece)
                    lanes.handed_over(piece.numel() * dtype.itemsize)
                    if progress is not None:
                        progress(lanes.done_nbytes, total_nbytes)
            lanes.drain()
            writer.sync()
            lanes.drain()
            files.append(ExportedFile(file_name, len(shapes), writer.finish().nbytes))
    if progress is not None:
        progress(total_nbytes, total_nbytes)
    return tuple(files)


def _write_index(path: Path, shards: dict[str, dict[str, tuple[int, ...]]], dtype: torch.dtype) -> None:
    numel = sum(math.prod(shape) for shard in shards.values() for shape in shard.values())
    weight_map = {name: file_name for file_name, shard in shards.items() for name in shard}
    index = {"metadata": {"total_size": numel * dtype.itemsize}, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
