"""LLM: text in, text out. The Python API over weights, scheme, tokenizer and generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.calibration.scheme_file import TunedScheme, is_scheme_file
from megatron_lowbit.chat import render_chat
from megatron_lowbit.comm.policy import Policy, PolicyLog, shared_policy
from megatron_lowbit.comm.saturation import SaturationLog
from megatron_lowbit.comm.schemes import CommScheme, parse_scheme
from megatron_lowbit.generate import GenerationTimes, TokenGeneration
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sampling import SamplingParams
from megatron_lowbit.text_stream import TextStream
from megatron_lowbit.tokenizer import Tokenizer
from megatron_lowbit.weights import ModelWeights, load_weights

FinishReason = Literal["stop", "length", "context"]


@dataclass(frozen=True)
class TextEvent:
    """New text of one prompt; `finish_reason` comes with the last event of each.

    stop: an end token or stop string; length: max_new_tokens reached; context: the model's context is full.
    """

    prompt: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """The whole continuation of one prompt."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason


class LLM:
    """A model with one communication scheme.

    >>> llm = LLM("checkpoint", scheme="int4-outlier", calibration="calibration.safetensors",
    ...           context=ParallelContext.from_environment())  # doctest: +SKIP
    >>> llm.generate(["The capital of France is"])[0].text  # doctest: +SKIP

    model: a converted checkpoint, a Hugging Face directory, or weights loaded before. scheme: a name, a scheme, or a
    file of `megatron-lowbit tune-scheme`, which has its calibration in it. calibration: a file, or loaded.
    count_saturation: fill `saturation`, for statistics; costs a pass over every message.
    policy: which messages of a two-stage scheme may go exactly or in one stage, by size: "auto" (defaults), a policy, a
    file of `megatron-lowbit tune` (read by rank 0, for all), or None for the scheme at every size.
    Raises ValueError or FileNotFoundError for what does not fit, RankError where another rank failed.
    """

    def __init__(
        self,
        model: str | Path | ModelWeights,
        *,
        scheme: str | Path | CommScheme | TunedScheme = "bf16",
        calibration: str | Path | CommCalibration | None = None,
        context: ParallelContext | None = None,
        dtype: torch.dtype | None = None,
        tokenizer: Tokenizer | None = None,
        backend: str = "auto",
        count_saturation: bool = False,
        policy: str | Path | Policy | None = "auto",
    ) -> None:
        own = TunedScheme.load(Path(scheme)) if isinstance(scheme, str | Path) and is_scheme_file(scheme) else scheme
        if isinstance(own, TunedScheme):
            if calibration is not None:
                raise ValueError(f"scheme file {own.name} has a calibration of its own; leave the other one out")
            scheme, calibration = own.scheme, own.calibration
        assert not isinstance(scheme, Path | TunedScheme)
        self.scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
        if isinstance(model, ModelWeights):
            if tokenizer is None:
                raise ValueError("an LLM over loaded weights needs the tokenizer too: pass tokenizer=")
            self.weights, self.tokenizer = model, tokenizer
        else:
            self.weights = load_weights(Path(model), context or ParallelContext.single(), dtype)
            self.tokenizer = tokenizer or Tokenizer.from_directory(Path(model))
        if isinstance(calibration, str | Path):
            calibration = CommCalibration.load(Path(calibration))
        #: filled while the model runs, where it was asked for
        self.saturation: SaturationLog = {}
        log = self.saturation if count_saturation else None
        #: how often each collective was taken
        self.policy_log = PolicyLog()
        chosen = shared_policy(self.weights.context, policy)
        self.model = self.weights.build_with_scheme(self.scheme, calibration, backend, log, chosen, self.policy_log)
        self.times = GenerationTimes()

    def stream(self, prompts: Sequence[str], params: SamplingParams | None = None) -> Iterator[TextEvent]:
        """Continues all prompts side by side, yielding text as it comes. On every rank the same events."""
        yield from self._stream([self.tokenizer.encode(prompt) for prompt in prompts], params or SamplingParams())

    def generate(self, prompts: Sequence[str], params: SamplingParams | None = None) -> list[Completion]:
        """The whole continuation of each prompt."""
        return self._collect(len(prompts), self.stream(prompts, params))

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's chat format; ValueError where it has none."""
        template = self.tokenizer.chat_template
        if template is None:
            raise ValueError("this model has no chat template; use plain prompts")
        text = render_chat(template, messages, self.tokenizer.bos_token, self.tokenizer.eos_token)
        return self.tokenizer.encode(text, add_bos=False, parse_special=True)

    def chat_stream(
        self, conversations: Sequence[Sequence[dict[str, str]]], params: SamplingParams | None = None
    ) -> Iterator[TextEvent]:
        """Like `stream`, for conversations of `{"role": …, "content": …}` messages."""
        prompts = self.weights.context.together(lambda: [self.chat_prompt(messages) for messages in conversations])
        yield from self._stream(prompts, params or SamplingParams())

    def _collect(self, count: int, events: Iterator[TextEvent]) -> list[Completion]:
        texts, tokens = [""] * count, [()] * count  # type: list[str], list[tuple[int, ...]]
        reasons: list[FinishReason] = ["length"] * count
        for event in events:
            texts[event.prompt] += event.text
            tokens[event.prompt] += event.tokens
            reasons[event.prompt] = event.finish_reason or reasons[event.prompt]
        return [Completion(*parts) for parts in zip(texts, tokens, reasons, strict=True)]

    def _stream(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Iterator[TextEvent]:
        generation = TokenGeneration(self.model, prompts, params)
        self.times = generation.times
        eos = set() if params.ignore_eos else {*self.tokenizer.eos_ids, *self.weights.config.eos_token_ids}
        streams = [TextStream(self.tokenizer, params.stop) for _ in prompts]
        produced = [0] * len(prompts)
        while generation.active:
            done = []
            for prompt, token in generation.step().items():
                produced[prompt] += 1
                reason: FinishReason | None = None
                text = ""
                if token in eos:
                    reason = "stop"
                else:
                    text = streams[prompt].push(token)
                    if streams[prompt].stopped:
                        reason = "stop"
                    elif produced[prompt] >= params.max_new_tokens:
                        reason = "length"
                    elif generation.context_is_full(prompt):
                        reason = "context"
                if reason is not None:
                    done.append(prompt)
                    text += streams[prompt].finish()
                yield TextEvent(prompt, text, (token,), reason)
            if done:
                generation.finish(done)
