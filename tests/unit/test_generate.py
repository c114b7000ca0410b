"""TokenGeneration: transformers' greedy tokens, prompts that come and go, the end of the context, times."""

from __future__ import annotations

import pytest
import torch
from helpers.model_cases import generate, logits_of, prompt_of

from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.generate import GenerationTimes, TokenGeneration
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sampling import SamplingParams
from megatron_lowbit.weights import load_weights


@pytest.fixture(params=[1, 3])
def weights(request, tiny_models):
    return load_weights(tiny_models("odd"), ParallelContext.virtual_ranks(request.param), torch.float32)


@pytest.fixture
def model(weights):
    return weights.build_with_scheme(parse_scheme("exact"))


def best_by_full_recompute(weights, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens without any cache: the whole sequence again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_of(weights, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_tokens_equal_a_full_recompute_and_transformers(weights, tiny_models):
    prompts = [prompt_of(131, length, start) for length, start in ((5, 3), (14, 1), (1, 2))]
    got = generate(weights, prompts, SamplingParams(max_new_tokens=12))
    for prompt, tokens in zip(prompts, got, strict=True):
        assert tokens == best_by_full_recompute(weights, prompt, 12)
        made = tiny_models.hf("odd").generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), max_new_tokens=12,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert tokens == made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.2, top_k=0, seed=4)])
@pytest.mark.parametrize("scheme", ["exact", "int4-group", "bf16:one-stage"])
def test_a_finished_prompt_leaves_the_others_as_they_were(weights, params, scheme):
    prompts = [prompt_of(131, length, start) for length, start in ((5, 3), (9, 1), (2, 2))]
    expected = generate(weights, prompts, SamplingParams(**{**vars(params), "max_new_tokens": 10}), scheme)
    generation = TokenGeneration(
        weights.build_with_scheme(parse_scheme(scheme)),
        prompts,
        SamplingParams(**{**vars(params), "max_new_tokens": 10}),
    )
    got: list[list[int]] = [[], [], []]
    ends = {2: [1], 6: [0]}
    for step in range(10):
        for sequence, token in generation.step().items():
            got[sequence].append(token)
        generation.finish(ends.get(step, []))
    assert [len(tokens) for tokens in got] == [7, 3, 10]
    for tokens, whole in zip(got, expected, strict=True):
        assert tokens == whole[: len(tokens)]
    assert generation.active == [2]
    generation.finish([2])
    assert generation.active == [] and generation.step() == {}


def test_step_names_the_sequences_it_continues(model):
    generation = TokenGeneration(model, [[1], [2], [3]], SamplingParams(max_new_tokens=4))
    assert list(generation.step()) == [0, 1, 2]
    generation.finish([0, 2])
    assert list(generation.step()) == [1]


def test_the_context_ends_where_the_model_ends(model, weights):
    """96 positions: the last token that has a place is number 95, counted from 0."""
    prompt = prompt_of(131, 93)
    generation = TokenGeneration(model, [prompt, [5]], SamplingParams(max_new_tokens=500))
    full = []
    for _ in range(3):
        assert set(generation.step()) == {0, 1}
        full.append([generation.context_is_full(sequence) for sequence in (0, 1)])
    assert full == [[False, False], [False, False], [True, False]]
    generation.finish([0])
    generation.step()
    assert not generation.context_is_full(1)


@pytest.mark.parametrize(
    ("length", "message"), [(0, "prompt 1 is empty"), (96, "prompt 1 has 96 tokens.*holds 96"), (200, "has 200 tokens")]
)
def test_prompts_that_do_not_fit_are_refused(model, length, message):
    with pytest.raises(ValueError, match=message):
        TokenGeneration(model, [[1, 2], prompt_of(131, length)], SamplingParams())


def test_the_longest_prompt_that_fits(model):
    generation = TokenGeneration(model, [prompt_of(131, 95)], SamplingParams(max_new_tokens=9))
    generation.step()
    assert generation.context_is_full(0)


def test_no_prompts_is_nothing_to_do(model):
    assert TokenGeneration(model, [], SamplingParams()).step() == {}


def test_times_count_prompt_and_decode_tokens_apart(model):
    generation = TokenGeneration(model, [[1, 2, 3], [4]], SamplingParams(max_new_tokens=5))
    for _ in range(3):
        generation.step()
    times = generation.times
    assert (times.prefill_tokens, times.decode_tokens) == (4, 4)
    assert times.prefill_s > 0 and times.decode_s > 0
    assert times.decode_tokens_per_s == times.decode_tokens / times.decode_s
    assert GenerationTimes().prefill_tokens_per_s == GenerationTimes().decode_tokens_per_s == 0.0


def test_decode_sends_what_the_scheme_says(tiny_models):
    """One token of two prompts a step, at 4 sync points; nothing else goes over the wire of virtual ranks."""
    weights = load_weights(tiny_models("odd"), ParallelContext.virtual_ranks(3), torch.float32)
    scheme = parse_scheme("int4-group")
    generation = TokenGeneration(weights.build_with_scheme(scheme), [[1, 2, 3], [4]], SamplingParams(max_new_tokens=5))
    traffic = weights.context.traffic
    traffic.reset()
    generation.step()
    per_token = round(scheme.sent_nbytes_per_token(81, 3) * 3) * 4
    assert traffic.total_nbytes() == 4 * per_token
    traffic.reset()
    generation.step()
    assert traffic.total_nbytes() == 2 * per_token
