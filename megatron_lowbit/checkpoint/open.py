"""open_checkpoint: from a path to the reader of the format found there."""

from __future__ import annotations

from pathlib import Path

from megatron_lowbit.checkpoint.huggingface import HuggingFaceCheckpoint
from megatron_lowbit.checkpoint.manifest import MANIFEST_FILE
from megatron_lowbit.checkpoint.reader import CheckpointReader
from megatron_lowbit.checkpoint.tensor_parallel import TensorParallelCheckpoint

GGUF_MAGIC = b"GGUF"


def open_checkpoint(path: Path) -> CheckpointReader:
    """Opens a folder converted by megatron-lowbit or a Hugging Face folder.

    Raises FileNotFoundError for a path that is not there, ValueError for a GGUF file or anything else.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; give the folder of a checkpoint")
    if path.is_file():
        if is_gguf(path):
            raise ValueError(
                f"{path}: a GGUF file; convert it first: megatron-lowbit convert {path} FOLDER --tp RANKS, "
                "then give that FOLDER"
            )
        raise ValueError(f"{path}: a file, expected the folder of a checkpoint; give the folder that holds config.json")
    if (path / MANIFEST_FILE).is_file():
        return TensorParallelCheckpoint(path)
    if any(path.glob("rank-*-of-*.safetensors")):
        raise FileNotFoundError(
            f"{path / MANIFEST_FILE}: no such file beside the rank files; the conversion was cut off or the copy is "
            "incomplete, convert or copy the checkpoint again"
        )
    if (path / "config.json").is_file():
        return HuggingFaceCheckpoint(path)
    found = sorted(entry.name for entry in path.iterdir())
    ggufs = [name for name in found if name.endswith(".gguf")]
    if ggufs:
        raise ValueError(
            f"{path}: holds a GGUF file; convert it first: megatron-lowbit convert {path / ggufs[0]} FOLDER --tp RANKS"
        )
    raise ValueError(
        f"{path}: no checkpoint here ({'found ' + ', '.join(found[:4]) if found else 'the folder is empty'}); expected "
        f"{MANIFEST_FILE} (written by megatron-lowbit convert) or config.json with safetensors (Hugging Face)"
    )


def is_gguf(path: Path) -> bool:
    """Whether a file starts as a GGUF file does."""
    with path.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
