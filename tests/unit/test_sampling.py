"""Sampling: greedy ties, top-k and top-p, statistics of draws, and numbers that belong to one sequence alone."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sampling import Sampler, SamplingParams

SINGLE = ParallelContext.single()


class Logits:
    """An output head that takes hidden states for logits."""

    start = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        return hidden_NH.float()


def draw(logits: list[float], params: SamplingParams, count: int) -> list[int]:
    """`count` tokens in a row of one sequence with the same logits each time."""
    row, sampler = torch.tensor([logits]), Sampler(params, 1)
    return [sampler.next_tokens(SINGLE, Logits(len(logits)), row, [0])[0] for _ in range(count)]


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    weights = [math.exp(value / temperature) for value in logits]
    return [weight / sum(weights) for weight in weights]


def chi_square(tokens: list[int], probabilities: list[float]) -> float:
    counts = [tokens.count(token) for token in range(len(probabilities))]
    assert sum(counts) == len(tokens)
    return sum(
        (found - len(tokens) * p) ** 2 / (len(tokens) * p) for found, p in zip(counts, probabilities, strict=True) if p
    )


LOGITS = [1.0, -0.5, 2.0, 0.0, 1.5, -2.0]
# chi-square with 5 degrees of freedom lies below 20.5 with probability 0.999; seeds are fixed, so it does or does not
LIMIT = 20.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_draws_follow_the_softmax(temperature, seed):
    tokens = draw(LOGITS, SamplingParams(temperature=temperature, top_k=0, seed=seed), 2000)
    assert chi_square(tokens, softmax(LOGITS, temperature)) < LIMIT
    # and the test would notice another temperature
    assert chi_square(tokens, softmax(LOGITS, 1.3 * temperature)) > LIMIT


def test_first_draws_of_neighbouring_sequences_follow_it_too():
    """Their generators have neighbouring seeds, which weak generators turn into neighbouring numbers."""
    count = 3000
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=0), count)
    rows = torch.tensor([LOGITS]).expand(count, -1)
    tokens = sampler.next_tokens(SINGLE, Logits(6), rows, list(range(count)))
    assert chi_square(tokens, softmax(LOGITS)) < LIMIT
    pairs = [6 * first + second for first, second in zip(tokens[::2], tokens[1::2], strict=True)]
    joint = [p * q for p in softmax(LOGITS) for q in softmax(LOGITS)]
    assert chi_square(pairs, joint) < 66.6  # 35 degrees of freedom, 0.999


def test_top_k_draws_among_the_best_only():
    tokens = draw(LOGITS, SamplingParams(temperature=1.0, top_k=3), 1000)
    best = [0.0 if token not in (0, 2, 4) else p for token, p in enumerate(softmax(LOGITS))]
    assert set(tokens) == {0, 2, 4}
    assert chi_square(tokens, [p / sum(best) for p in best]) < 13.9  # 2 degrees of freedom, 0.999


@pytest.mark.parametrize("top_k", [6, 7, 1000])
def test_top_k_beyond_the_vocabulary_is_all_of_it(top_k):
    everything = draw(LOGITS, SamplingParams(temperature=1.0, top_k=0, seed=3), 50)
    assert draw(LOGITS, SamplingParams(temperature=1.0, top_k=top_k, seed=3), 50) == everything


def test_top_k_of_one_is_greedy():
    assert set(draw(LOGITS, SamplingParams(temperature=5.0, top_k=1), 50)) == {2}


def test_top_p_keeps_the_smallest_set_that_holds_it():
    logits = [math.log(p) for p in (0.1, 0.5, 0.05, 0.3, 0.05)]
    for top_p, expected in ((0.4, {1}), (0.6, {1, 3}), (0.85, {1, 3, 0}), (0.92, {1, 3, 0, 2}), (1.0, {0, 1, 2, 3, 4})):
        tokens = draw(logits, SamplingParams(temperature=1.0, top_k=0, top_p=top_p), 300)
        assert set(tokens) == expected, top_p
    tokens = draw(logits, SamplingParams(temperature=1.0, top_k=0, top_p=0.6), 1000)
    assert chi_square(tokens, [0.0, 0.5 / 0.8, 0.0, 0.3 / 0.8, 0.0]) < 10.9  # 1 degree of freedom, 0.999


def test_a_tiny_top_p_keeps_the_best_token():
    assert set(draw(LOGITS, SamplingParams(temperature=3.0, top_k=0, top_p=1e-9), 50)) == {2}


def test_top_p_counts_within_top_k():
    """Among 0.5 and 0.3, the first holds 0.625 of the whole."""
    logits = [math.log(p) for p in (0.1, 0.5, 0.1, 0.3)]
    assert set(draw(logits, SamplingParams(temperature=1.0, top_k=2, top_p=0.6), 300)) == {1}
    assert set(draw(logits, SamplingParams(temperature=1.0, top_k=2, top_p=0.65), 300)) == {1, 3}


def test_greedy_takes_the_first_of_equal_tokens():
    logits = [0.0, 3.0, 1.0, 3.0, 3.0]
    assert draw(logits, SamplingParams(), 3) == [1, 1, 1]
    assert draw([2.0] * 9, SamplingParams(), 1) == [0]


def test_greedy_draws_no_random_numbers():
    """So that a seed means the same whether or not another request was greedy."""
    sampler = Sampler(SamplingParams(), 1)
    before = sampler._generators[0].get_state()
    sampler.next_tokens(SINGLE, Logits(6), torch.tensor([LOGITS]), [0])
    assert torch.equal(sampler._generators[0].get_state(), before)


def test_what_a_sequence_gets_does_not_depend_on_its_batch_mates():
    params = SamplingParams(temperature=1.5, top_k=0, seed=7)
    rows = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    together = Sampler(params, 4)
    expected = [together.next_tokens(SINGLE, Logits(30), rows, [0, 1, 2, 3]) for _ in range(20)]
    assert len({tuple(column) for column in zip(*expected, strict=True)}) == 4
    # sequences 0 and 2 end after five tokens, the others go on as before
    some = Sampler(params, 4)
    for step in range(5):
        assert some.next_tokens(SINGLE, Logits(30), rows, [0, 1, 2, 3]) == expected[step]
    for step in range(5, 20):
        got = some.next_tokens(SINGLE, Logits(30), rows[[1, 3]], [1, 3])
        assert got == [expected[step][1], expected[step][3]]
    # and a row's place in the batch is not what counts
    turned = Sampler(params, 4)
    assert turned.next_tokens(SINGLE, Logits(30), rows[[3, 0]], [3, 0]) == [expected[0][3], expected[0][0]]


def test_seeds_and_repetition():
    def tokens(seed: int) -> list[int]:
        return draw([0.0] * 50, SamplingParams(temperature=1.0, top_k=0, seed=seed), 20)

    assert tokens(1) == tokens(1) != tokens(2)
    torch.manual_seed(0)
    assert tokens(1) == tokens(1), "the global generator has no say"


def test_extreme_logits_stay_numbers():
    assert set(draw([1e30, 0.0, -1e30], SamplingParams(temperature=1e-3, top_k=0), 20)) == {0}
    assert set(draw([-math.inf, 0.0, -math.inf], SamplingParams(temperature=1.0, top_k=0), 20)) == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"stop": ("a", "")}, "empty stop string"),
    ],
)
def test_parameters_without_meaning_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**arguments)
