"""Vocabulary-parallel embedding and output head: each rank holds a contiguous part of the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_lowbit.layers.sharded import ShardedModule
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sharding import TensorSource

# Shapes: T tokens, N rows, H hidden features, V vocabulary (V' this rank's part).

EMBEDDING = "embedding"
_HEAD_BLOCK = 8192


class VocabParallelEmbedding(ShardedModule):
    """Rows of token vectors. Every rank knows who holds which token, so holders send their rows and nothing is summed:
    half the bytes of an all-reduce, and exact.

    scale: factor on the vectors, rounded to `dtype` as in the training of Gemma (sqrt(3072) is 55.5 in bf16).
    """

    weight: torch.Tensor

    def __init__(self, context: ParallelContext, source: TensorSource, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__(context)
        self._scale = torch.tensor(scale, dtype=dtype).item()
        self.add_parameter("weight", dtype, source)
        ranks = 1 if context.virtual else context.size
        self._spans = [source.rule.span(rank, ranks) for rank in range(ranks)]

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """`[T, H]` in the model's dtype, the same on all ranks."""
        rows_TH = self._rows(tokens_T)
        return rows_TH if self._scale == 1.0 else rows_TH * self._scale

    def _rows(self, tokens_T: torch.Tensor) -> torch.Tensor:
        if len(self._spans) == 1:
            return F.embedding(tokens_T, self.weight)
        held_by = [((tokens_T >= start) & (tokens_T < stop)).nonzero().flatten() for start, stop in self._spans]
        rank = self.context.rank
        mine = F.embedding(tokens_T[held_by[rank]] - self._spans[rank][0], self.weight)
        rows = {
            peer: mine.new_empty(index.numel(), mine.shape[1]) for peer, index in enumerate(held_by) if peer != rank
        }
        self.context.exchange(dict.fromkeys(rows, mine), rows, EMBEDDING)
        out_TH = mine.new_empty(tokens_T.shape[0], mine.shape[1])
        for peer, index in enumerate(held_by):
            out_TH[index] = mine if peer == rank else rows[peer]
        return out_TH


class VocabParallelHead:
    """Projects hidden states to this rank's part of the vocabulary; `weight` may be the embedding's (tied).

    softcap: logits become `softcap * tanh(logit / softcap)`.
    """

    def __init__(
        self, context: ParallelContext, weight: torch.Tensor, source: TensorSource, softcap: float | None = None
    ) -> None:
        self._softcap = softcap
        self.weight = weight
        self.vocab_size = source.shape[0]
        self.start = source.rule.span(*context.shard)[0]

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """FP32 `[N, V']` of one product in the model's dtype: what generation samples from."""
        return self._capped(F.linear(hidden_NH, self.weight).float())

    def precise_logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """FP32 `[N, V']` computed in FP32, so that bf16 rounding of logits does not hide small differences.

        The weight is widened block by block: memory stays bounded for large vocabularies.
        """
        hidden = hidden_NH.float()
        out_NV = hidden.new_empty(hidden.shape[0], self.weight.shape[0])
        for out, block in zip(out_NV.split(_HEAD_BLOCK, dim=1), self.weight.split(_HEAD_BLOCK), strict=True):
            torch.mm(hidden, block.float().t(), out=out)
        return self._capped(out_NV)

    def _capped(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """In place: logits of a whole window are the largest tensor there is."""
        if self._softcap is None:
            return logits_NV
        return logits_NV.div_(self._softcap).tanh_().mul_(self._softcap)
