"""Arithmetic on logits whose vocabulary is cut over ranks, equal on all of them: log-softmax, best token, top-k."""

from __future__ import annotations

import torch

from megatron_lowbit.parallel import ParallelContext

# Shapes: N rows, V' this rank's part of the vocabulary (may be empty), K candidates, R ranks.

_ROWS_AT_ONCE = 32
_MAGNITUDE = 0x7FFFFFFF  # all bits of an int32 but the sign


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
        values_NK, local_NK = logits_NV.max(dim=-1, keepdim=True)  # the first of equal ones
        keys_NK = _sort_keys(values_NK, local_NK + first_token)
    else:
        keys_NK = _largest_keys(logits_NV, first_token, min(count, logits_NV.shape[1]))
    if context.size > 1 and not context.virtual:
        padded = keys_NK.new_full((keys_NK.shape[0], count), torch.iinfo(torch.int64).min)
        padded[:, : keys_NK.shape[1]] = keys_NK
        gathered_RNK = context.all_gather(padded, purpose)
        keys_NK = gathered_RNK.transpose(0, 1).flatten(1).topk(count, dim=-1).values
    bits = (keys_NK >> 32).int()
    values = (bits ^ ((bits >> 31) & _MAGNITUDE)).view(torch.float32)
    return values, _MAGNITUDE - (keys_NK & 0xFFFFFFFF)


def _largest_keys(logits_NV: torch.Tensor, first_token: int, count: int) -> torch.Tensor:
    """Sort keys `[N, count]` of each row, descending.

    `topk` takes any of the tokens that share the last place, and with bf16 products equal logits are common: it only
    says how large a logit must be.
    """
    keys_NK = torch.empty(logits_NV.shape[0], count, dtype=torch.int64, device=logits_NV.device)
    least_N1 = logits_NV.topk(count, dim=-1).values[:, -1:]
    for keys_K, logits_V, least in zip(keys_NK, logits_NV, least_N1, strict=True):
        local = (~(logits_V < least)).nonzero().flatten()  # NaN among them
        keys_K.copy_(_sort_keys(logits_V[local], local + first_token).topk(count).values)
    return keys_NK


def _sort_keys(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """int64 that orders by logit, of equal ones the lower token first: no two are equal, so any sort will do."""
    bits = (logits + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = bits ^ ((bits >> 31) & _MAGNITUDE)  # integers in the order of the floats
    return (ordered.long() << 32) | (_MAGNITUDE - tokens)
