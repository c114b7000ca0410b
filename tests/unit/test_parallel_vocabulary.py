"""Log-softmax and best tokens over a vocabulary, and the order of equal logits."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.vocab_parallel import log_normaliser, sum_over_ranks, top_candidates

SINGLE = ParallelContext.single()


def sorted_candidates(row: list[float], count: int) -> list[tuple[float, int]]:
    """Largest first, of equal logits the lower token."""
    return sorted(((value, token) for token, value in enumerate(row)), key=lambda pair: (-pair[0], pair[1]))[:count]


@pytest.mark.parametrize("count", [1, 2, 5, 40, 97])
@pytest.mark.parametrize("ties", [False, True])
def test_candidates_equal_a_sort_in_plain_python(count, ties):
    """Ties are the rule with bf16 logits: which of two equal tokens is drawn must not depend on torch's mood."""
    rng = random.Random(count)
    rows = [[rng.choice([-1.5, 0.0, 2.0]) if ties else rng.gauss(0, 1) for _ in range(97)] for _ in range(6)]
    values, tokens = top_candidates(SINGLE, torch.tensor(rows), 0, count, "test")
    assert values.dtype == torch.float32 and tokens.dtype == torch.int64
    for row, got_values, got_tokens in zip(torch.tensor(rows).tolist(), values.tolist(), tokens.tolist(), strict=True):
        expected = sorted_candidates(row, count)
        assert got_values == [value for value, _ in expected]
        assert got_tokens == [token for _, token in expected]


def test_ties_in_a_large_vocabulary():
    """Large enough for every partial sort of torch to take its fast path."""
    logits = torch.zeros(2, 50_000)
    logits[0, 30_000:] = 1.0
    logits[1, 49_999] = 2.0
    assert top_candidates(SINGLE, logits, 0, 4, "test")[1].tolist() == [
        [30_000, 30_001, 30_002, 30_003], [49_999, 0, 1, 2],
    ]  # fmt: skip
    assert top_candidates(SINGLE, logits, 0, 1, "test")[1].tolist() == [[30_000], [49_999]]


def test_zeros_of_both_signs_are_equal():
    logits = torch.tensor([[-0.0, 0.0, -0.0, -1.0]])
    for count in (1, 2, 3):
        assert top_candidates(SINGLE, logits, 0, count, "test")[1].tolist() == [[0, 1, 2][:count]]


def test_extreme_logits_keep_their_order():
    logits = torch.tensor([[-torch.inf, 3e38, -3e38, torch.inf, 1e-45, -1e-45, -2.0]])
    assert top_candidates(SINGLE, logits, 0, 7, "test")[1].tolist() == [[3, 1, 4, 5, 6, 2, 0]]


def test_the_first_token_of_a_shard_is_added():
    assert top_candidates(SINGLE, torch.tensor([[1.0, 5.0]]), 40, 2, "test")[1].tolist() == [[41, 40]]


def test_log_normaliser_is_logsumexp():
    logits = torch.randn(70, 33, generator=torch.Generator().manual_seed(0)) * 20
    got = log_normaliser(SINGLE, logits, "test")
    # FP32 against FP64 in numbers up to about 60: one rounding of the result and some of the sum
    torch.testing.assert_close(got.double(), logits.double().logsumexp(dim=-1), rtol=1e-6, atol=0)
    assert log_normaliser(SINGLE, torch.tensor([[1000.0, 1000.0]]), "test").item() == pytest.approx(1000.6931)
    assert torch.equal(log_normaliser(ParallelContext.virtual_ranks(3), logits, "test"), got)


def test_sum_over_one_process_is_the_value():
    value = torch.tensor([1.0, 2.0])
    assert sum_over_ranks(SINGLE, value, "test") is value
    assert sum_over_ranks(ParallelContext.virtual_ranks(4), value, "test") is value
