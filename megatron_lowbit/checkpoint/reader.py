"""CheckpointReader: what a checkpoint format offers to the loader and the converter, and the strictness they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch

from megatron_lowbit.config import ModelConfig
from megatron_lowbit.sharding import TensorSource

SHOWN_NAMES = 4


class CheckpointReader(Protocol):
    """Full tensors of a model by canonical (un-merged Hugging Face) name, whatever the files look like.

    Tensors are returned on the CPU in the stored dtype (`dtype(name)`) and belong to the caller. Every method that
    takes a name raises ValueError for one that is not in `names()`; reading raises ValueError for damaged files.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def directory(self) -> Path:
        """Folder that holds the weights (and the tokenizer files beside them)."""
        ...

    def names(self) -> set[str]:
        """Every tensor in the files that should be a weight, known or not: `check_complete` judges them."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the full tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> torch.Tensor:
        """The full tensor."""
        ...

    def read_span(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """`full.narrow(dim, start, stop - start)`, contiguous, reading no more of the file than the format needs."""
        ...


def check_span(name: str, shape: tuple[int, ...], dim: int, start: int, stop: int) -> tuple[int, ...]:
    """Shape of `[start, stop)` along `dim` of a full tensor; ValueError where the span leaves the tensor."""
    if not 0 <= dim < len(shape) or not 0 <= start <= stop <= shape[dim]:
        raise ValueError(f"tensor {name} has shape {shape}: it has no span [{start}, {stop}) along dimension {dim}")
    return (*shape[:dim], stop - start, *shape[dim + 1 :])


def shown(names: Iterable[str]) -> str:
    """The first few names of a sorted list, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN_NAMES} more" if len(ordered) > SHOWN_NAMES else ""
    return ", ".join(ordered[:SHOWN_NAMES]) + more


def check_complete(reader: CheckpointReader, sources: Mapping[str, TensorSource]) -> None:
    """Raises ValueError unless the checkpoint holds exactly the tensors of `sources`, each with its full shape."""
    found, expected = reader.names(), set(sources)
    missing, unused = expected - found, found - expected
    if missing:
        first = min(missing)
        raise ValueError(
            f"{reader.directory}: {len(missing)} of {len(expected)} tensors are missing ({shown(missing)}); expected "
            f"{first} with shape {sources[first].shape}. Check that config.json belongs to these weights and that the "
            "download is complete"
        )
    if unused:
        raise ValueError(
            f"{reader.directory}: {len(unused)} tensors have no place in a {reader.config.family} model with this "
            f"config.json ({shown(unused)}); is the config of another model, or are these adapter weights?"
        )
    for name in sorted(expected):
        if reader.shape(name) != sources[name].shape:
            raise ValueError(
                f"{reader.directory}: tensor {name} has shape {reader.shape(name)}, expected {sources[name].shape} "
                "from its config.json; use the config that belongs to these weights"
            )
        if not reader.dtype(name).is_floating_point:
            raise ValueError(
                f"{reader.directory}: tensor {name} is stored as {reader.dtype(name)}, expected a floating point type;"
                " use the unquantised checkpoint"
            )
