"""AnswerScores: how likely a model finds the answers of a task, many short sequences side by side in each pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.models.decoder import Decoder
from megatron_lowbit.task_questions import ScoredSequence
from megatron_lowbit.vocab_parallel import log_normaliser, sum_over_ranks, top_candidates

# Shapes: S sequences of a pass, N scored tokens of them, H hidden features, V' this rank's part of the vocabulary.

PURPOSE = "tasks"
#: Of all sequences of a forward pass; one that is longer gets a pass of its own.
TOKENS_AT_ONCE = 2048
#: Of logits held at a time: 256 MiB of FP32.
LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class AnswerScores:
    """Of the sequences of a pass: sums of the log-likelihoods of each one's scored tokens, nats, FP64 `[S]`, and the
    tokens the model finds most likely in their places (none were not asked for). Equal on all ranks."""

    log_likelihood_S: torch.Tensor
    likeliest: list[tuple[int, ...]]


def passes(sequences: Sequence[ScoredSequence], tokens_at_once: int = TOKENS_AT_ONCE) -> Iterator[list[ScoredSequence]]:
    """Cuts into runs of up to so many tokens, in order: sequences lie side by side without padding."""
    group: list[ScoredSequence] = []
    held = 0
    for sequence in sequences:
        if group and held + len(sequence.tokens) > tokens_at_once:
            yield group
            group, held = [], 0
        group.append(sequence)
        held += len(sequence.tokens)
    if group:
        yield group


def score_answers(
    model: Decoder, group: Sequence[ScoredSequence], likeliest: bool, logits_at_once: int = LOGITS_AT_ONCE
) -> AnswerScores:
    """One forward pass; the head is computed where a token is scored, in blocks of rows. Called on all ranks alike."""
    context = model.context
    rows: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    start = 0
    for owner, sequence in enumerate(group):
        scored = range(sequence.first_scored, len(sequence.tokens))
        rows += [start + position - 1 for position in scored]  # a token is predicted at the one before it
        targets += sequence.tokens[sequence.first_scored :]
        owners += [owner] * len(scored)
        start += len(sequence.tokens)
    hidden_TH = model(TokenBatch.prompts([sequence.tokens for sequence in group], context.device))
    hidden_NH = hidden_TH[torch.tensor(rows, device=context.device)]
    head = model.head
    # the same on all ranks, whose parts differ: each block ends in an exchange
    block = max(1, logits_at_once // (head.vocab_size if context.virtual else -(-head.vocab_size // context.size)))
    found: list[torch.Tensor] = []
    best: list[int] = []
    for block_NH, block_targets in zip(
        hidden_NH.split(block), torch.tensor(targets, device=context.device).split(block), strict=True
    ):
        logits_NV = head.precise_logits(block_NH)
        local_N = block_targets - head.start
        here_N = (local_N >= 0) & (local_N < logits_NV.shape[1])
        logit_N = logits_NV.new_zeros(len(local_N), dtype=torch.float64)
        logit_N[here_N] = logits_NV[here_N, local_N[here_N]].double()
        logit_N = sum_over_ranks(context, logit_N, PURPOSE)
        found.append((logit_N - log_normaliser(context, logits_NV, PURPOSE)).cpu())
        if likeliest:
            best += top_candidates(context, logits_NV, head.start, 1, PURPOSE)[1][:, 0].tolist()
    sums_S = torch.zeros(len(group), dtype=torch.float64).index_add_(0, torch.tensor(owners), torch.cat(found))
    each = iter(best)
    predicted = [tuple(islice(each, len(one.tokens) - one.first_scored)) for one in group] if likeliest else []
    return AnswerScores(sums_S, predicted)
