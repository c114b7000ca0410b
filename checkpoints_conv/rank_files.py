"""Rank files: all tensors of a checkpoint, streamed into one file a rank, while other threads hash and write."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints_conv.lanes import Lanes
from checkpoints_conv.row_blocks import part_of_rank, row_blocks
from checkpoints_conv.streaming_writer import StreamingSafetensorsWriter, safetensors_header
from megatron_lowbit.checkpoint.manifest import FileRecord, Progress
from megatron_lowbit.checkpoint.reader import CheckpointReader
from megatron_lowbit.checkpoint.tensor_parallel import rank_file_name
from megatron_lowbit.sharding import TensorSource

MAX_LANES = 8


@dataclass(frozen=True)
class RankSummary:
    """`tensors` counts those of which the rank holds something; `nbytes` is the size of its file."""

    rank: int
    file: str
    tensors: int
    nbytes: int


def lane_count(files: int) -> int:
    """Threads for so many files: two a file are of use, and not many more than there are processors."""
    return max(2, min(2 * files, MAX_LANES, os.cpu_count() or 2))


def rank_summary(sources: Mapping[str, TensorSource], rank: int, tp: int, dtype: torch.dtype) -> RankSummary:
    """What a rank's file will be, to the byte."""
    shapes = {name: source.shard_shape(rank, tp) for name, source in sources.items()}
    numels = [math.prod(shape) for shape in shapes.values()]
    nbytes = len(safetensors_header(shapes, dtype)) + sum(numels) * dtype.itemsize
    return RankSummary(rank, rank_file_name(rank, tp), sum(numel > 0 for numel in numels), nbytes)


def write_rank_files(
    reader: CheckpointReader,
    sources: Mapping[str, TensorSource],
    directory: Path,
    tp: int,
    dtype: torch.dtype,
    progress: Progress | None,
) -> dict[str, FileRecord]:
    """Writes the tensors, in the order of `sources`, into the `tp` files, which are on disk when this returns.

    progress: bytes of weights written so far and in all. Each tensor is read once, front to back. Memory: some blocks.
    """
    total_nbytes = sum(
        math.prod(source.shard_shape(rank, tp)) * dtype.itemsize for source in sources.values() for rank in range(tp)
    )
    with ExitStack() as stack:
        files = ExitStack()
        stack.push(files)  # closed last, when no job can write any more
        lanes = stack.enter_context(Lanes(lane_count(tp)))
        writers = [
            files.enter_context(
                StreamingSafetensorsWriter(
                    directory / rank_file_name(rank, tp),
                    {name: source.shard_shape(rank, tp) for name, source in sources.items()},
                    dtype,
                    lanes,
                    rank,
                )
            )
            for rank in range(tp)
        ]
        for source in sources.values():
            for first_row, block in row_blocks(reader, source.name, dtype):
                nbytes = 0
                for rank, writer in enumerate(writers):
                    piece = part_of_rank(source, block, first_row, rank, tp)
                    writer.append(source.name, piece)
                    nbytes += piece.numel() * dtype.itemsize
                lanes.handed_over(nbytes)
                if progress is not None:
                    progress(lanes.done_nbytes, total_nbytes)
        lanes.drain()
        for writer in writers:
            writer.sync()
        lanes.drain()
        if progress is not None:
            progress(lanes.done_nbytes, total_nbytes)
        return {rank_file_name(rank, tp): writer.finish() for rank, writer in enumerate(writers)}
