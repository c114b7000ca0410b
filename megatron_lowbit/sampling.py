"""Sampling: from logits to the next token of each sequence, identical on all ranks and free of batch-mates."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from megatron_lowbit.layers.embedding import VocabParallelHead
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.vocab_parallel import top_candidates

# Shapes: B sequences, H hidden features, K candidates.

SAMPLING = "sampling"


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    temperature: 0 takes the best token. top_k: sample among that many best tokens (0: the whole vocabulary, which
    sends all logits over the network). top_p: among the smallest set of them that holds this probability.
    stop: strings that end a text and are cut off it. ignore_eos: go on past end-of-sequence tokens.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive finite number")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (whole vocabulary) or positive")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if "" in self.stop:
            raise ValueError("an empty stop string would stop at once; leave it out")


def _stream_seed(seed: int, sequence: int) -> int:
    """A seed for each sequence; sums would give sequence 1 of seed 0 the numbers of sequence 0 of seed 1."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{sequence}".encode()).digest()[:7], "little")


class Sampler:
    """Draws the next tokens of a batch. Each sequence has its own random numbers, from the seed and its number."""

    def __init__(self, params: SamplingParams, sequences: int) -> None:
        self._params = params
        # one generator a sequence: what a prompt gets does not depend on the prompts beside it
        self._generators = [
            torch.Generator().manual_seed(_stream_seed(params.seed, index)) for index in range(sequences)
        ]

    def next_tokens(
        self, context: ParallelContext, head: VocabParallelHead, hidden_BH: torch.Tensor, sequences: list[int]
    ) -> list[int]:
        """One token for each row; `sequences` says which sequence a row belongs to."""
        params = self._params
        greedy = params.temperature == 0.0
        count = 1 if greedy else min(params.top_k or head.vocab_size, head.vocab_size)
        values_BK, tokens_BK = top_candidates(context, head.logits(hidden_BH), head.start, count, SAMPLING)
        if greedy:
            return tokens_BK[:, 0].tolist()
        # FP64 on the CPU: the same draw on every kind of device
        probabilities = (values_BK.cpu().double() / params.temperature).softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.where(before < params.top_p, torch.zeros_like(probabilities))
        cumulative = probabilities.cumsum(dim=-1)
        chosen = []
        for row, sequence in enumerate(sequences):
            draw = torch.rand((), dtype=torch.float64, generator=self._generators[sequence])
            position = int(torch.searchsorted(cumulative[row], draw * cumulative[row, -1], right=True))
            chosen.append(int(tokens_BK[row, min(position, tokens_BK.shape[1] - 1)]))
        return chosen
