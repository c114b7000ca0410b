"""Sources of a conversion: any format that can be read, and the type its weights are kept in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from checkpoints_conv.gguf_reader import GGUFCheckpoint
from megatron_lowbit.checkpoint.manifest import DTYPES
from megatron_lowbit.checkpoint.open import is_gguf, open_checkpoint
from megatron_lowbit.checkpoint.reader import CheckpointReader

MANTISSA_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
SMALLEST_NORMAL_FP16 = 6.1e-5
SHORT_NAMES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16", torch.float64: "fp64",
}  # fmt: skip


def open_source(path: Path) -> CheckpointReader:
    """`open_checkpoint`, and GGUF files as well."""
    if path.is_file() and is_gguf(path):
        return GGUFCheckpoint(path)
    return open_checkpoint(path)


def stored_dtype(reader: CheckpointReader, names: Iterable[str]) -> torch.dtype:
    """The type that all tensors are stored in; ValueError where they differ or it is none that is written here."""
    examples = {reader.dtype(name): name for name in names}
    if len(examples) > 1:
        found = ", ".join(f"{name} is {short_name(dtype)}" for dtype, name in examples.items())
        raise ValueError(f"{reader.directory}: the tensors are of several types ({found}); choose one with --dtype")
    (dtype,) = examples
    if dtype not in DTYPES.values():
        raise ValueError(
            f"{reader.directory}: the tensors are {short_name(dtype)}, which is not written; choose one of "
            f"{', '.join(map(short_name, DTYPES.values()))} with --dtype"
        )
    return dtype


def rounding_notes(reader: CheckpointReader, names: Iterable[str], dtype: torch.dtype) -> list[str]:
    """What writing as `dtype` does to the values, in words; nothing where they stay as they are."""
    notes = []
    for stored in sorted({reader.dtype(name) for name in names}, key=short_name):
        before, after = MANTISSA_BITS.get(stored, 0), MANTISSA_BITS[dtype]
        way = f"{short_name(stored)} -> {short_name(dtype)}"
        if before > after:
            notes.append(
                f"{way}: {after} of {before} mantissa bits are left, values are rounded to nearest even; "
                f"--dtype {'fp32' if stored == torch.float64 else short_name(stored)} keeps more"
            )
        if dtype == torch.float16 and stored != torch.float16:
            notes.append(f"{way}: values below {SMALLEST_NORMAL_FP16} in magnitude lose bits, the smallest become 0")
    return notes


def short_name(dtype: torch.dtype) -> str:
    """As `--dtype` names it."""
    return SHORT_NAMES.get(dtype, str(dtype).removeprefix("torch."))
