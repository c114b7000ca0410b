"""StoredPart: where a canonical tensor lies in a Hugging Face checkpoint that merges, renames or transposes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoredPart:
    """A canonical tensor as part of a stored one; reader and exporter follow it in opposite directions.

    The stored tensor's leading dimension is fixed at `index` where that is given (one expert of many); what is left is
    transposed where `transposed` (a matrix); the canonical tensor is `[start:stop:step]` of that along dimension 0.
    shape: of the whole stored tensor. Canonical tensors without an entry are stored under their own name and shape.

    Phi-3's key projection: `StoredPart("…qkv_proj.weight", (Q + 2 * K, H), start=Q, stop=Q + K)`. gpt-oss's up
    projection of expert 3: `StoredPart("…experts.gate_up_proj", (E, H, 2 * F), index=3, transposed=True, start=1,
    stop=2 * F, step=2)`. Of each stored tensor, the parts together must cover all elements exactly once.
    """

    name: str
    shape: tuple[int, ...]
    index: int | None = None
    transposed: bool = False
    start: int = 0
    stop: int | None = None
    step: int = 1
