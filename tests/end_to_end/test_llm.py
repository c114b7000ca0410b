"""The Python API as a program uses it: text in, text out, on one process of one or several virtual ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.command_line import Workshop

from megatron_lowbit import (
    LLM,
    CommCalibration,
    Completion,
    ParallelContext,
    SamplingParams,
    load_weights,
    parse_scheme,
)

PROMPTS = ["Once upon", "A", "Sentence 7 of a text that"]
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def llm(workshop: Workshop) -> LLM:
    return LLM(workshop.hf, dtype=torch.float32)


def test_completions_are_the_events_put_together(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    completions = llm.generate(PROMPTS, params)
    events = list(llm.stream(PROMPTS, params))
    for index, completion in enumerate(completions):
        own = [event for event in events if event.prompt == index]
        assert completion.text == "".join(event.text for event in own)
        assert completion.tokens == tuple(token for event in own for token in event.tokens)
        assert completion.text == llm.tokenizer.decode(completion.tokens)
        assert [event.finish_reason for event in own] == [None] * 5 + ["length"]
    assert llm.times.decode_tokens == 5 * len(PROMPTS) and llm.times.decode_tokens_per_s > 0


def test_a_batch_gives_what_each_prompt_gives_alone(llm: LLM) -> None:
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    assert llm.generate(PROMPTS, params) == [llm.generate([prompt], params)[0] for prompt in PROMPTS]


def test_a_stop_string_ends_one_text_and_not_the_others(llm: LLM) -> None:
    free = llm.generate(PROMPTS, SamplingParams(max_new_tokens=12, ignore_eos=True))
    stop = free[0].text[3:5]
    stopped = llm.generate(PROMPTS, SamplingParams(max_new_tokens=12, ignore_eos=True, stop=(stop,)))
    assert stopped[0].finish_reason == "stop"
    for before, after in zip(free, stopped, strict=True):
        assert after.text == before.text.split(stop)[0]


def test_an_end_token_ends_the_text_without_showing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    free = llm.generate(["Once"], SamplingParams(max_new_tokens=5, ignore_eos=True))[0]
    monkeypatch.setattr(llm.tokenizer, "eos_ids", (free.tokens[2],))
    first = free.tokens.index(free.tokens[2])
    ended = llm.generate(["Once"], SamplingParams(max_new_tokens=5))[0]
    assert ended == Completion(llm.tokenizer.decode(free.tokens[:first]), free.tokens[: first + 1], "stop")


def test_a_full_context_ends_the_text(llm: LLM) -> None:
    limit = llm.weights.config.max_position
    prompt = "x" * (limit - 4)
    held = len(llm.tokenizer.encode(prompt))
    completion = llm.generate([prompt], SamplingParams(max_new_tokens=100, ignore_eos=True))[0]
    assert completion.finish_reason == "context" and held + len(completion.tokens) == limit


def test_chat_is_the_rendered_prompt(workshop: Workshop, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(workshop.hf, tmp_path / "chat"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    llm = LLM(folder, dtype=torch.float32)
    messages = [{"role": "user", "content": "Hello <s> there"}]
    ids = llm.chat_prompt(messages)
    assert llm.tokenizer.decode(ids, skip_special=False) == "<s>user: Hello <s> there\nassistant:"
    assert ids[0] == llm.tokenizer.bos_id
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    streamed = "".join(event.text for event in llm.chat_stream([messages], params))
    assert streamed == "".join(event.text for event in llm._stream([ids], params))


def test_no_chat_without_a_template(llm: LLM) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        next(llm.chat_stream([[{"role": "user", "content": "Hello"}]]))


def test_virtual_ranks_at_low_bits_count_what_they_clamp(workshop: Workshop) -> None:
    llm = LLM(
        workshop.tp2, scheme="int4-outlier", calibration=workshop.calibration, count_saturation=True, policy=None,
        context=ParallelContext.virtual_ranks(2),
    )  # fmt: skip
    completions = llm.generate(PROMPTS[:1], SamplingParams(max_new_tokens=3, ignore_eos=True))
    assert len(completions[0].tokens) == 3
    tokens = len(llm.tokenizer.encode(PROMPTS[0])) + 2
    hidden = llm.weights.config.hidden_size
    assert {counter.values for counter in llm.saturation.values()} == {3 * tokens * hidden}  # two partials and a sum


def test_weights_are_shared_between_schemes(workshop: Workshop) -> None:
    weights = load_weights(workshop.tp2, ParallelContext.virtual_ranks(2))
    calibration = CommCalibration.load(workshop.calibration)
    exact = weights.build_with_scheme(parse_scheme("exact"))
    low = weights.build_with_scheme(parse_scheme("int4"), calibration)
    assert exact.norm.weight.data_ptr() == low.norm.weight.data_ptr()
    with pytest.raises(ValueError, match="needs the tokenizer too"):
        LLM(weights)


def test_a_calibration_is_asked_for(workshop: Workshop) -> None:
    with pytest.raises(ValueError, match="megatron-lowbit calibrate"):
        LLM(workshop.tp2, scheme="int4", context=ParallelContext.virtual_ranks(2))
