"""The KV cache: tokens one by one, in chunks, or beside other sequences give what the whole sequence gives."""

from __future__ import annotations

import pytest
import torch
from helpers.model_cases import prompt_of

from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.layers.kv_cache import KVCache, TokenBatch
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.weights import load_weights

# FP32: attention over a cache sums the same terms in another order, see test_models_virtual_tp.
TOLERANCE = 2e-5
CPU = torch.device("cpu")


@pytest.fixture(params=["odd", "biased", "sparse"])
def model(request, tiny_models):
    weights = load_weights(tiny_models(request.param), ParallelContext.virtual_ranks(3), torch.float32)
    return weights.build_with_scheme(parse_scheme("exact"))


def whole(model, prompt) -> torch.Tensor:
    return model(TokenBatch.prompts([prompt], CPU))


def close(got, expected) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def test_token_by_token_equals_the_whole(model):
    prompt = prompt_of(model.config.vocab_size, 40)
    expected, cache = whole(model, prompt), model.new_cache(1, 48)
    for position, token in enumerate(prompt):
        got = model(TokenBatch(torch.tensor([token]), (1,), (position,)), cache)
        close(got[0], expected[position])
    assert cache.lengths == [40]


@pytest.mark.parametrize("chunks", [(40,), (1, 39), (39, 1), (13, 14, 13), (7, 1, 1, 31)])
def test_chunked_prefill_equals_the_whole(model, chunks):
    prompt = prompt_of(model.config.vocab_size, 40)
    expected, cache, start = whole(model, prompt), model.new_cache(1, 40), 0
    for length in chunks:
        tokens = torch.tensor(prompt[start : start + length])
        close(model(TokenBatch(tokens, (length,), (start,)), cache), expected[start : start + length])
        start += length


def test_sequences_side_by_side_do_not_see_each_other(model):
    """Unequal lengths, prefilled together, then decoded together: each as if it were alone."""
    vocabulary = model.config.vocab_size
    prompts = [prompt_of(vocabulary, length, start=length) for length in (17, 1, 30)]
    cache = model.new_cache(3, 40)
    hidden = model(TokenBatch.prompts([prompt[:-1] for prompt in prompts if len(prompt) > 1], CPU))
    close(hidden, torch.cat([whole(model, prompt)[:-1] for prompt in prompts if len(prompt) > 1]))
    batch = TokenBatch.prompts(prompts, CPU)
    hidden = model(batch, cache)
    close(hidden, torch.cat([whole(model, prompt) for prompt in prompts]))
    assert batch.last_rows.tolist() == [16, 17, 47]
    for step in range(4):
        news = [(5 * step + row) % vocabulary for row in range(3)]
        hidden = model(TokenBatch(torch.tensor(news), (1, 1, 1), tuple(cache.lengths)), cache)
        for row, new in enumerate(news):
            prompts[row].append(new)
            close(hidden[row], whole(model, prompts[row])[-1])


def test_chunks_of_unequal_lengths_and_starts_together(model):
    """One sequence is longer by a chunk when the other joins: starts and lengths all differ."""
    vocabulary = model.config.vocab_size
    prompts = [prompt_of(vocabulary, 30, start=1), prompt_of(vocabulary, 23, start=2)]
    cache = model.new_cache(2, 30)
    first = TokenBatch(torch.tensor(prompts[0][:20] + prompts[1][:2]), (20, 2), (0, 0))
    second = TokenBatch(torch.tensor(prompts[0][20:29] + prompts[1][2:3]), (9, 1), (20, 2))
    third = TokenBatch(torch.tensor(prompts[0][29:] + prompts[1][3:]), (1, 20), (29, 3))
    got = [model(batch, cache) for batch in (first, second, third)]
    expected = [whole(model, prompt) for prompt in prompts]
    close(torch.cat((got[0][:20], got[1][:9], got[2][:1])), expected[0])
    close(torch.cat((got[0][20:], got[1][9:], got[2][1:])), expected[1])


def test_dropping_a_sequence_keeps_the_others(model):
    vocabulary = model.config.vocab_size
    prompts = [prompt_of(vocabulary, length, start=length) for length in (5, 9, 7)]
    cache = model.new_cache(3, 20)
    model(TokenBatch.prompts(prompts, CPU), cache)
    cache.keep([0, 2])
    assert cache.lengths == [5, 7]
    hidden = model(TokenBatch(torch.tensor([1, 2]), (1, 1), tuple(cache.lengths)), cache)
    close(hidden[0], whole(model, [*prompts[0], 1])[-1])
    close(hidden[1], whole(model, [*prompts[2], 2])[-1])


def test_garbage_behind_a_sequence_is_not_seen(model):
    """Slots beyond a shorter sequence's end are masked, whatever finite numbers they hold."""
    vocabulary = model.config.vocab_size
    prompts = [prompt_of(vocabulary, 3), prompt_of(vocabulary, 12)]
    cache = model.new_cache(2, 20)
    model(TokenBatch.prompts(prompts, CPU), cache)
    for keys, values in zip(cache.keys, cache.values, strict=True):
        keys[0, :, 3:], values[0, :, 3:] = 50.0, -1e6
    hidden = model(TokenBatch(torch.tensor([1, 1]), (1, 1), tuple(cache.lengths)), cache)
    close(hidden[0], whole(model, [*prompts[0], 1])[-1])


def test_decode_mask_only_where_lengths_differ():
    batch = TokenBatch(torch.tensor([5, 6]), (1, 1), (2, 0))
    assert batch.is_decode and batch.positions_T.tolist() == [2, 0]
    first, end, mask = batch.decode_view(None)
    assert (first, end) == (0, 3) and mask is not None
    assert mask[:, 0, 0].tolist() == [[True, True, True], [True, False, False]]
    assert TokenBatch(torch.tensor([5, 6]), (1, 1), (4, 4)).decode_view(None) == (0, 5, None)


def test_views_of_a_window():
    """A token sees itself and the one before: positions of a decode step begin where the last sequence looks."""
    batch = TokenBatch(torch.tensor([5, 6]), (1, 1), (5, 3))
    first, end, mask = batch.decode_view(2)
    assert (first, end) == (2, 6) and mask is not None
    assert mask[:, 0, 0].tolist() == [[False, False, True, True], [True, True, False, False]]
    assert TokenBatch(torch.tensor([5, 6]), (1, 1), (4, 4)).decode_view(2) == (3, 5, None)
    seen = batch.causal_mask(1, 3, 2).int().tolist()
    assert seen == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert batch.causal_mask(1, 2, None).int().tolist() == [[1, 1, 0], [1, 1, 1]]


def test_positions_of_chunks():
    batch = TokenBatch(torch.arange(5), (3, 2), (0, 7))
    assert not batch.is_decode
    assert batch.positions_T.tolist() == [0, 1, 2, 7, 8] and batch.last_rows.tolist() == [2, 4]


def test_a_batch_whose_lengths_do_not_add_up_is_refused():
    with pytest.raises(AssertionError):
        TokenBatch(torch.arange(5), (3, 3), (0, 0))


def test_cache_starts_finite():
    """Masked slots are multiplied by a weight of 0: they must not hold NaN."""
    cache = KVCache(2, 3, 1, 4, 6, torch.bfloat16, CPU)
    assert cache.lengths == [0, 0, 0]
    assert all(not part.any() for part in (*cache.keys, *cache.values))
    assert cache.keys[0].shape == (3, 1, 4, 6)
