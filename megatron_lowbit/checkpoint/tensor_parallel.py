"""TensorParallelCheckpoint: our own format, one safetensors file a rank, readable at any tensor-parallel size.

Each rank file holds the canonical, un-merged tensors cut by their ShardRule: replicated tensors whole in every file,
a block that two ranks need in both, and an empty tensor (a shape with a 0) where a rank holds nothing.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch

from megatron_lowbit.checkpoint.manifest import DTYPES, Manifest, Progress, sha256_of
from megatron_lowbit.checkpoint.model_config_file import read_model_config
from megatron_lowbit.checkpoint.reader import check_span, shown
from megatron_lowbit.checkpoint.safetensors_file import SafetensorsFile
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.registry import tensor_sources
from megatron_lowbit.sharding import ShardRule

CONFIG_FILE = "config.json"
MAX_HASH_THREADS = 8
HF_CONFIG_FILE = "huggingface_config.json"  # for export: what transformers reads


def rank_file_name(rank: int, size: int) -> str:
    """File of one rank: `rank-00-of-04.safetensors`."""
    return f"rank-{rank:02d}-of-{size:02d}.safetensors"


@dataclass(frozen=True)
class _Piece:
    """Positions [start, stop) of a full tensor, along its cut dimension, as rank `rank`'s file holds them."""

    rank: int
    start: int
    stop: int
    offset: int
    """Where `start` lies in the rank's shard."""


class TensorParallelCheckpoint:
    """Full tensors and spans of them, assembled from the rank files.

    Opening checks the manifest, every file's size and header, the SHA-256 of config.json, and that each rank file
    holds the shards the config asks for. It does not hash the weights: call `verify_file` for the files of
    `files_for_rank` before reading, or `verify_hashes` for all. Raises FileNotFoundError or ValueError naming the file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = Manifest.read(directory)
        required = [CONFIG_FILE, *(rank_file_name(rank, self.tp) for rank in range(self.tp))]
        unlisted = [name for name in required if name not in self.manifest.files]
        if unlisted:
            raise ValueError(
                f"{directory}: manifest.json does not list {shown(unlisted)}; convert the checkpoint again"
            )
        self.manifest.check_sizes(directory)
        self._verified: set[str] = set()
        self.verify_file(CONFIG_FILE)
        self.config: ModelConfig = read_model_config(directory / CONFIG_FILE)
        self._sources = tensor_sources(self.config)
        self._rank_files = [SafetensorsFile(directory / rank_file_name(rank, self.tp)) for rank in range(self.tp)]
        for rank, file in enumerate(self._rank_files):
            self._check_shards(rank, file)

    @property
    def tp(self) -> int:
        """Number of rank files."""
        return self.manifest.tp

    def names(self) -> set[str]:
        return set(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        self._check_name(name)
        return self._sources[name].shape

    def dtype(self, name: str) -> torch.dtype:
        self._check_name(name)
        return DTYPES[self.manifest.dtype]

    def read(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        return self.read_span(name, 0, 0, shape[0])

    def read_span(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        shape = check_span(name, self.shape(name), dim, start, stop)
        rule = self._sources[name].rule
        if 0 in shape:
            return torch.empty(shape, dtype=self.dtype(name))
        if rule.dim is None:
            rank = self._replica(self._verified)
            return self._rank_files[rank].read_span(name, dim, start, stop)
        along = dim == rule.dim
        pieces = self._pieces(rule, start if along else 0, stop if along else rule.extent(), self._verified)
        if along and len(pieces) == 1:
            return self._read_piece(name, rule.dim, pieces[0])
        out = torch.empty(shape, dtype=self.dtype(name))
        for piece in pieces:
            count = piece.stop - piece.start
            if along:
                out.narrow(dim, piece.start - start, count).copy_(self._read_piece(name, dim, piece))
            else:
                part = self._rank_files[piece.rank].read_span(name, dim, start, stop)
                out.narrow(rule.dim, piece.start, count).copy_(part.narrow(rule.dim, piece.offset, count))
        return out

    def files_for_rank(self, rank: int, size: int) -> list[str]:
        """Names of the files that hold all that `rank` of `size` loads; its own file alone where `size` is `tp`."""
        if size == self.tp:
            return [rank_file_name(rank, size)]
        ranks: set[int] = set()
        for source in self._sources.values():
            if source.rule.dim is not None:
                start, stop = source.rule.span(rank, size)
                preferred = {rank_file_name(chosen, self.tp) for chosen in ranks}
                ranks |= {piece.rank for piece in self._pieces(source.rule, start, stop, preferred)}
        return [rank_file_name(chosen, self.tp) for chosen in sorted(ranks or {0})]

    def verify_file(self, name: str, progress: Progress | None = None) -> None:
        """Raises ValueError unless the file's SHA-256 is the one in the manifest.

        Verified files are preferred by later reads of what several rank files hold.
        """
        if name not in self.manifest.files:
            raise ValueError(f"{self.directory}: manifest.json lists no file {name}")
        self._verify([name], progress)

    def verify_hashes(self, progress: Progress | None = None) -> None:
        """`verify_file` for every file of the manifest."""
        self._verify(sorted(self.manifest.files), progress)

    def _verify(self, names: list[str], progress: Progress | None) -> None:
        total, done, lock = sum(self.manifest.files[name].nbytes for name in names), 0, Lock()

        def advance(nbytes: int) -> None:
            nonlocal done
            with lock:
                done += nbytes
                if progress is not None:
                    progress(done, total)

        # hashing lets go of Python's lock, so files are hashed side by side
        with ThreadPoolExecutor(min(len(names), MAX_HASH_THREADS, os.cpu_count() or 1)) as pool:
            sums = list(pool.map(lambda name: sha256_of(self.directory / name, advance), names))
        for name, found in zip(names, sums, strict=True):
            expected = self.manifest.files[name].sha256
            if found != expected:
                raise ValueError(
                    f"{self.directory / name}: SHA-256 is {found}, expected {expected}; the file was altered or "
                    "damaged since the conversion, convert or copy it again"
                )
            self._verified.add(name)

    def _check_name(self, name: str) -> None:
        if name not in self._sources:
            raise ValueError(f"{self.directory}: there is no tensor {name}; there are: {shown(self._sources)}")

    def _check_shards(self, rank: int, file: SafetensorsFile) -> None:
        missing, unused = set(self._sources) - set(file.tensors), set(file.tensors) - set(self._sources)
        if missing or unused:
            what = f"lacks {shown(missing)}" if missing else f"holds unexpected tensors: {shown(unused)}"
            raise ValueError(f"{file.path}: the file {what}; it does not belong to {CONFIG_FILE}, convert again")
        for name, source in self._sources.items():
            stored, shape = file.tensors[name], source.shard_shape(rank, self.tp)
            dtype = DTYPES[self.manifest.dtype]
            if stored.shape != shape or stored.dtype != dtype:
                raise ValueError(
                    f"{file.path}: tensor {name} has shape {stored.shape} and type {stored.dtype}, expected {shape} "
                    f"and {dtype} for rank {rank} of {self.tp}; convert the checkpoint again"
                )

    def _replica(self, preferred: Collection[str]) -> int:
        """Rank whose file serves tensors that every file holds."""
        return min(range(self.tp), key=lambda rank: (rank_file_name(rank, self.tp) not in preferred, rank))

    def _pieces(self, rule: ShardRule, start: int, stop: int, preferred: Collection[str]) -> list[_Piece]:
        """Which rank files give [start, stop) along the cut dimension, in order, `preferred` files first."""
        spans = [rule.span(rank, self.tp) for rank in range(self.tp)]
        pieces: list[_Piece] = []
        while start < stop:
            holders = [rank for rank, (first, last) in enumerate(spans) if first <= start < last]
            assert holders, (rule, self.tp, start)
            rank = min(holders, key=lambda rank: (rank_file_name(rank, self.tp) not in preferred, -spans[rank][1]))
            end = min(stop, spans[rank][1])
            pieces.append(_Piece(rank, start, end, start - spans[rank][0]))
            start = end
        return pieces

    def _read_piece(self, name: str, dim: int, piece: _Piece) -> torch.Tensor:
        count = piece.stop - piece.start
        return self._rank_files[piece.rank].read_span(name, dim, piece.offset, piece.offset + count)
