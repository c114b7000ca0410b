"""Arithmetic on logits whose vocabulary is cut over ranks, equal on all of them: log-softmax, best token, top-k."""

from __future__ import annotations

import torch

from megatron_lowbit.parallel import ParallelContext

# Shapes: N rows, V' this rank's part of the vocabulary (may be empty), K candidates, R ranks.

_ROWS_AT_ONCE = 32


def log_normaliser(context: ParallelContext, logits_NV: torch.Tensor, purpose: str) -> torch.Tensor:
    """`log sum exp` over the whole vocabulary, FP32 `[N]`; partial sums are added in rank order."""
    if logits_NV.shape[1]:
        # in blocks of rows: the temporaries of a whole window would leave every cache
        local_N = torch.cat([rows.logsumexp(dim=-1) for rows in logits_NV.split(_ROWS_AT_ONCE)])
    else:
        local_N = logits_NV.new_full((len(logits_NV),), -torch.inf)
    if context.virtual or context.size == 1:
        return local_N
    return context.all_gather(local_N, purpose).logsumexp(dim=0)


def sum_over_ranks(context: ParallelContext, local: torch.Tensor, purpose: str) -> torch.Tensor:
    """Sum of equally shaped tensors in rank order, the same on all ranks."""
    if context.virtual or context.size == 1:
        return local
    total, *others = context.all_gather(local, purpose)
    for other in others:
        total = total + other
    return total


def top_candidates(
    context: ParallelContext, logits_NV: torch.Tensor, first_token: int, count: int, purpose: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest logits of each row over the whole vocabulary: (FP32 values, int64 tokens), each `[N, K]`.

    Sorted from large to small, of equal logits the lower token first. Each rank sends its own best `count`.
    """
    if count == 1 and logits_NV.shape[1]:
        values_NK, local = logits_NV.max(dim=-1, keepdim=True)
    else:
        values_NK, local = logits_NV.topk(min(count, logits_NV.shape[1]), dim=-1)
    tokens_NK = local + first_token
    if context.size > 1 and not context.virtual:
        rows = logits_NV.shape[0]
        packed = torch.zeros(2, rows, count, dtype=torch.int32, device=logits_NV.device)
        found = values_NK.shape[1]
        padded = values_NK.new_full((rows, count), -torch.inf)
        padded[:, :found] = values_NK
        packed[0] = padded.view(torch.int32)
        packed[1, :, :found] = tokens_NK.int()
        gathered = context.all_gather(packed, purpose)  # [R, 2, N, K]
        values_NK = gathered[:, 0].permute(1, 0, 2).reshape(rows, -1).view(torch.float32)
        tokens_NK = gathered[:, 1].permute(1, 0, 2).reshape(rows, -1).long()
    by_token = tokens_NK.argsort(dim=-1)
    values_NK, tokens_NK = values_NK.gather(1, by_token), tokens_NK.gather(1, by_token)
    by_value = values_NK.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return values_NK.gather(1, by_value), tokens_NK.gather(1, by_value)
