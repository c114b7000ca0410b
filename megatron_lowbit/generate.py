"""TokenGeneration: prefill and batched decode of several prompts over a KV cache, token by token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.models.decoder import Decoder
from megatron_lowbit.sampling import Sampler, SamplingParams


@dataclass
class GenerationTimes:
    """Seconds and tokens of prefill (prompts to first tokens) and decode (all later tokens)."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


@dataclass
class TokenGeneration:
    """One batch of prompts being continued. All ranks make the same calls and get the same tokens.

    prompts: token ids, each at least one. Raises ValueError (RankError on several ranks)
    where a prompt does not fit the model's context.
    """

    model: Decoder
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    active: list[int] = field(init=False)
    times: GenerationTimes = field(init=False, default_factory=GenerationTimes)

    def __post_init__(self) -> None:
        self.model.context.together(self._check_prompts)
        self.active = list(range(len(self.prompts)))
        self._sampler = Sampler(self.params, len(self.prompts))
        limit = self.model.config.max_position
        longest = max((len(prompt) for prompt in self.prompts), default=0)
        capacity = min(longest + self.params.max_new_tokens, limit)
        self._cache = self.model.new_cache(len(self.prompts), capacity)
        self._last: dict[int, int] = {}

    def _check_prompts(self) -> None:
        limit = self.model.config.max_position
        for number, prompt in enumerate(self.prompts):
            if not prompt:
                raise ValueError(f"prompt {number} is empty; give at least one token")
            if len(prompt) >= limit:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens, the model's context holds {limit} including at least "
                    "one new token; shorten the prompt"
                )

    def step(self) -> dict[int, int]:
        """The next token of every active sequence: prefill on the first call, one decode step on later ones."""
        if not self.active:
            return {}
        began = time.perf_counter()
        device = self.model.context.device
        first = not self._last
        if first:
            batch = TokenBatch.prompts([self.prompts[sequence] for sequence in self.active], device)
        else:
            tokens = torch.tensor([self._last[sequence] for sequence in self.active], device=device)
            batch = TokenBatch(tokens, (1,) * len(self.active), tuple(self._cache.lengths))
        hidden_TH = self.model(batch, self._cache)
        # only each sequence's last position is projected: the others' logits are not asked for
        hidden_BH = hidden_TH if batch.is_decode else hidden_TH[batch.last_rows]
        chosen = self._sampler.next_tokens(self.model.context, self.model.head, hidden_BH, self.active)
        self._last = dict(zip(self.active, chosen, strict=True))
        spent = time.perf_counter() - began
        if first:
            self.times.prefill_tokens += sum(batch.lengths)
            self.times.prefill_s += spent
        else:
            self.times.decode_tokens += len(chosen)
            self.times.decode_s += spent
        return dict(self._last)

    def finish(self, sequences: Sequence[int]) -> None:
        """Takes sequences out of the batch; their cache rows are dropped."""
        rows = [row for row, sequence in enumerate(self.active) if sequence not in sequences]
        self.active = [self.active[row] for row in rows]
        self._last = {sequence: self._last[sequence] for sequence in self.active}
        if self.active:
            self._cache.keep(rows)

    def context_is_full(self, sequence: int) -> bool:
        """True where the next token of an active sequence would not fit the model's context."""
        return self._cache.lengths[self.active.index(sequence)] + 1 >= self.model.config.max_position
