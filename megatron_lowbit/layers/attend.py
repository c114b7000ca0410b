"""Attention written out in FP32, for what the fused one of torch does not have: a soft cap on scores, and sinks."""

from __future__ import annotations

import torch

# Shapes: Q queries, E keys, D head features; leading dimensions are sequences and heads.


def attend(
    query_QD: torch.Tensor,
    key_ED: torch.Tensor,
    value_ED: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sink_Q1: torch.Tensor | None,
) -> torch.Tensor:
    """`softmax(scores) value`, `[..., Q, D]` in the dtype of the query.

    scores: `scale * query key^T`, then `softcap * tanh(score / softcap)` where given. mask: True where a query sees a
    key, broadcast to `[..., Q, E]`; each query must see one. sink_Q1: a logit that takes its share of each softmax
    and adds nothing.

    FP32 throughout, as fused kernels keep scores: with caps of 50, bf16 would round them to steps of 0.25.
    """
    scores_QE = (query_QD.float() @ key_ED.float().transpose(-1, -2)).mul_(scale)
    if softcap is not None:
        # a score below the cap is changed, so the mask comes after it
        scores_QE = scores_QE.div_(softcap).tanh_().mul_(softcap)
    scores_QE = scores_QE.masked_fill_(~mask, -torch.inf)
    if sink_Q1 is None:
        weights_QE = scores_QE.softmax(dim=-1)
    else:
        scores_QE = torch.cat((scores_QE, sink_Q1.expand(*scores_QE.shape[:-1], 1)), dim=-1)
        weights_QE = scores_QE.softmax(dim=-1)[..., :-1]
    return (weights_QE @ value_ED.float()).to(query_QD.dtype)
