"""Manifest: the file that lists what a tensor-parallel checkpoint consists of, with sizes and SHA-256 sums."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.checkpoint.json_file import is_plain_name, read_json_object

MANIFEST_FILE = "manifest.json"
FORMAT = "megatron-lowbit-tp"
VERSION = 1
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
MAX_TP = 512  # one open file a rank
HASH_BLOCK_NBYTES = 8 << 20

Progress = Callable[[int, int], None]
"""Called with (done_nbytes, total_nbytes) during long work."""


@dataclass(frozen=True)
class FileRecord:
    sha256: str
    nbytes: int


@dataclass(frozen=True)
class Manifest:
    """`dtype`: name of the weights' type, a key of DTYPES. `source`: what was converted, in words.

    `files`: every file of the checkpoint but the manifest itself.
    """

    tp: int
    dtype: str
    source: str
    files: Mapping[str, FileRecord]

    def __post_init__(self) -> None:
        assert 1 <= self.tp <= MAX_TP and self.dtype in DTYPES

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Raises FileNotFoundError without a manifest, ValueError for an invalid one or one of a later version."""
        path = directory / MANIFEST_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; convert the checkpoint again")
        data = read_json_object(path)
        if data.get("format") != FORMAT:
            raise ValueError(f"{path}: format is {data.get('format')!r}, expected {FORMAT!r}; convert the checkpoint")
        if data.get("version") != VERSION:
            raise ValueError(
                f"{path}: format version {data.get('version')!r}, this release reads {VERSION}; "
                "update megatron-lowbit or convert the checkpoint again"
            )
        tp, dtype, source, files = (data.get(key) for key in ("tp", "dtype", "source", "files"))
        known = isinstance(dtype, str) and dtype in DTYPES and type(tp) is int and 1 <= tp <= MAX_TP
        if not known or not isinstance(source, str) or not isinstance(files, dict):
            raise ValueError(f"{path}: tp, dtype, source or files is missing or invalid; convert the checkpoint again")
        assert isinstance(tp, int) and isinstance(dtype, str)
        return cls(tp, dtype, source, {name: _record(path, name, entry) for name, entry in files.items()})

    def check_sizes(self, directory: Path) -> None:
        """Raises unless every file is there with the recorded number of bytes."""
        for name, record in self.files.items():
            path = directory / name
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file, the manifest lists it; convert or copy it again")
            if path.stat().st_size != record.nbytes:
                raise ValueError(
                    f"{path}: {path.stat().st_size} bytes, expected {record.nbytes}; the file is truncated or altered, "
                    "convert or copy it again"
                )


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file; `progress` gets the size of each block hashed."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_NBYTES):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def _record(path: Path, name: str, entry: Any) -> FileRecord:
    if not is_plain_name(name) or name == MANIFEST_FILE:
        raise ValueError(f"{path}: {name!r} is not a plain file name inside the folder; do not use this checkpoint")
    sha256, nbytes = (entry.get("sha256"), entry.get("nbytes")) if isinstance(entry, dict) else (None, None)
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256) or type(nbytes) is not int:
        raise ValueError(f"{path}: the entry of {name} lacks a valid sha256 or nbytes; convert the checkpoint again")
    return FileRecord(sha256, nbytes)
