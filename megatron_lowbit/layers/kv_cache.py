"""TokenBatch and KVCache: the tokens of one forward pass, and the keys and values of those before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

# Shapes: T tokens of all sequences one after the other, B sequences, N key-value heads of this rank, D head features.


@dataclass(frozen=True)
class TokenBatch:
    """New tokens of several sequences, concatenated without padding, so that nothing useless goes over the wire.

    lengths: new tokens of each sequence, at least 1. starts: tokens of each that are in the cache already.
    """

    tokens_T: torch.Tensor
    lengths: tuple[int, ...]
    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        assert sum(self.lengths) == self.tokens_T.shape[0] and len(self.lengths) == len(self.starts)

    @classmethod
    def prompts(cls, sequences: Sequence[Sequence[int]], device: torch.device) -> TokenBatch:
        """Whole sequences from position 0."""
        flat = [token for sequence in sequences for token in sequence]
        lengths = tuple(len(sequence) for sequence in sequences)
        return cls(torch.tensor(flat, dtype=torch.int64, device=device), lengths, (0,) * len(lengths))

    @cached_property
    def positions_T(self) -> torch.Tensor:
        if self.is_decode:
            return torch.tensor(self.starts, device=self.tokens_T.device)
        pieces = [torch.arange(start, start + length) for start, length in zip(self.starts, self.lengths, strict=True)]
        return torch.cat(pieces).to(self.tokens_T.device)

    @property
    def is_decode(self) -> bool:
        return all(length == 1 for length in self.lengths)

    @cached_property
    def last_rows(self) -> torch.Tensor:
        """Index of each sequence's last new token, `[B]`."""
        return torch.tensor(self.lengths, device=self.tokens_T.device).cumsum(0) - 1

    def decode_view(self, window: int | None) -> tuple[int, int, torch.Tensor | None]:
        """(first, end, mask): the cached positions that the new tokens of all sequences see, `window` of each at most.

        mask: `[B, 1, 1, end - first]`, True where a sequence sees a position; None where all see the same.
        """
        if window not in self._decode_views:
            starts_B1 = torch.tensor(self.starts, device=self.tokens_T.device)[:, None]
            first = 0 if window is None else max(0, min(self.starts) + 1 - window)
            end, mask = max(self.starts) + 1, None
            if min(self.starts) + 1 < end:
                positions = torch.arange(first, end, device=starts_B1.device)
                mask = positions <= starts_B1
                if window is not None:
                    mask &= positions > starts_B1 - window
                mask = mask[:, None, None, :]
            self._decode_views[window] = first, end, mask
        return self._decode_views[window]

    def causal_mask(self, before: int, queries: int, window: int | None) -> torch.Tensor:
        """`[queries, before + queries]`, True where a query behind `before` keys sees a key: those up to its own
        position, the last `window` of them, its own included."""
        key = before, queries, window
        if key in self._window_masks:
            return self._window_masks[key]
        mask = torch.ones(queries, before + queries, dtype=torch.bool, device=self.tokens_T.device).tril(before)
        if window is None:  # not kept: those of a long prompt together are as large as its square
            return mask
        self._window_masks[key] = mask.triu(before + 1 - window)
        return self._window_masks[key]

    # made once and used by all layers with the same window

    @cached_property
    def _decode_views(self) -> dict[int | None, tuple[int, int, torch.Tensor | None]]:
        return {}

    @cached_property
    def _window_masks(self) -> dict[tuple[int, int, int | None], torch.Tensor]:
        return {}


class KVCache:
    """Keys and values `[B, N, capacity, D]` of every layer for a fixed set of sequences.

    Layers with a sliding window keep all positions, too: slots are positions in every layer, and any chunking of a
    prompt is exact. It costs memory, not time, since only the window is read.
    """

    def __init__(
        self, layers: int, sequences: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        shape = (sequences, kv_heads, capacity, head_dim)
        # zeros, not empty: masked slots must hold finite numbers, because 0 * NaN would reach the output
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.lengths = [0] * sequences
        self.capacity = capacity

    def advance(self, batch: TokenBatch) -> None:
        """Records that the batch's tokens are in the cache of every layer."""
        self.lengths = [start + length for start, length in zip(batch.starts, batch.lengths, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all sequences but `rows`."""
        index = torch.tensor(rows, device=self.keys[0].device)
        self.keys = [keys.index_select(0, index) for keys in self.keys]
        self.values = [values.index_select(0, index) for values in self.values]
        self.lengths = [self.lengths[row] for row in rows]
