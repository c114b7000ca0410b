"""score: what a scheme's logits say of next tokens, position by position, beside those of the exact sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.vocab_parallel import log_normaliser, sum_over_ranks, top_candidates

# Shapes: N scored positions, V' this rank's part of the vocabulary.

PURPOSE = "evaluation"
#: logits are compared in blocks of rows that stay in a cache
ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Reference:
    """What the exact sum predicts: log-probabilities and probabilities `[N, V']`, best token of each position."""

    log_probs: torch.Tensor
    probs: torch.Tensor
    best: torch.Tensor


@dataclass(frozen=True)
class TokenScores:
    """N next tokens, on the CPU and equal on all ranks.

    windows_N, positions_N: int64, where they stand: position p is predicted from p + 1 tokens. kl_N: KL divergence of
    the exact prediction from this one, nats; nll_N: of the text's token, nats; both FP64. agreed_N: the best token is
    the exact one's.
    """

    windows_N: torch.Tensor
    positions_N: torch.Tensor
    kl_N: torch.Tensor
    nll_N: torch.Tensor
    agreed_N: torch.Tensor


def score(
    context: ParallelContext,
    logits_NV: torch.Tensor,
    first_token: int,
    asked: Sequence[tuple[int, int, int]],
    reference: Reference | None,
) -> tuple[Reference, TokenScores]:
    """The reference (these logits' own, where none is given) and the scores.

    logits_NV: FP32, overwritten. first_token: of this rank's part. asked: window, position and next token of each row.
    """
    log_probs = logits_NV.sub_(log_normaliser(context, logits_NV, PURPOSE)[:, None])
    best = top_candidates(context, log_probs, first_token, 1, PURPOSE)[1][:, 0]
    windows, positions, tokens = torch.tensor(asked).unbind(1)
    targets = tokens.to(context.device) - first_token
    here = (targets >= 0) & (targets < log_probs.shape[1])
    target_log_prob = log_probs.new_zeros(len(targets), dtype=torch.float64)
    target_log_prob[here] = log_probs[here, targets[here]].double()
    if reference is None:
        reference = Reference(log_probs, log_probs.exp(), best)
        kl = torch.zeros_like(target_log_prob)
    else:
        kl = torch.cat(
            [
                torch.linalg.vecdot(probs, expected - found).double()
                for probs, expected, found in zip(
                    *(part.split(ROWS_AT_ONCE) for part in (reference.probs, reference.log_probs, log_probs)),
                    strict=True,
                )
            ]
        )
    kl, target_log_prob = sum_over_ranks(context, torch.stack((kl, target_log_prob)), PURPOSE).cpu()
    return reference, TokenScores(windows, positions, kl, -target_log_prob, (best == reference.best).cpu())
