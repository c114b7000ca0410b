"""ParallelContext over real processes: what it gathers, and how a failure of one rank becomes an error of all."""

from __future__ import annotations

import re
import time

import pytest
import torch
from helpers import context_cases
from helpers.ranks import RanksFailed

from megatron_lowbit.sharding import cut_evenly


def test_ranks_know_themselves(ranks):
    results = ranks(3).run(context_cases.facts)
    assert results == [
        {"rank": rank, "size": 3, "first": rank == 0, "local": [rank], "shard": [rank, 3]} for rank in range(3)
    ]


def test_json_of_all_ranks(ranks):
    expected = [{"rank": rank, "text": "ä€😀" * 100 * rank, "none": None, "list": [1.5, True]} for rank in range(3)]
    for result in ranks(3).run(context_cases.json_values):
        assert result == {"all": expected, "first": expected[0]}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "int64"])
@pytest.mark.parametrize("shape", [[2, 5], [0, 5], [1]])
def test_gathered_tensors_and_their_traffic(ranks, size, dtype, shape):
    values = torch.zeros(size, *shape)
    for rank in range(size):
        values[rank] = rank + 1
    nbytes = (size - 1) * torch.zeros(shape, dtype=getattr(torch, dtype)).nbytes
    for result in ranks(size).run(context_cases.gathered, shape=shape, dtype=dtype):
        assert torch.equal(result["gathered"], values.to(getattr(torch, dtype)))
        assert result["kept"] and result["traffic"] == {"test": nbytes}
        assert result["messages"] == {"test": (size - 1) if nbytes else 0}


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        ([None, None, None], ""),
        ([None, "no file", None], "rank 1: no file"),
        (["no file", None, "no file"], "rank 0, 2: no file"),
        (["no file"] * 3, "no file"),
        (["no file", "no space", None], "rank 0: no file; rank 1: no space"),
    ],
)
def test_a_problem_of_one_is_told_by_all(ranks, problems, message):
    for result in ranks(3).run(context_cases.agreements, problems=problems):
        assert result["message"] == message


def test_different_values_are_told_by_all(ranks):
    for result in ranks(3).run(context_cases.same, values=[{"a": [1]}] * 3):
        assert result["message"] == ""
    for result in ranks(3).run(context_cases.same, values=[1, 2, 1]):
        assert result["message"] == (
            "the setting differs between ranks (rank 0 has 1; rank 1 has 2; rank 2 has 1); "
            "start every rank with the same arguments"
        )


@pytest.mark.parametrize("error", ["ValueError", "OSError"])
def test_work_done_together_fails_together(ranks, error):
    for rank, result in enumerate(ranks(3).run(context_cases.work_together, failing=[], error=error)):
        assert result == {"message": "", "results": [rank], "after": [0, 1, 2]}
    for result in ranks(3).run(context_cases.work_together, failing=[0, 2], error=error):
        assert result["message"] == "rank 0: no luck on 0; rank 2: no luck on 2"
        assert result["results"] == [] and result["after"] == [0, 1, 2]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_candidates_over_ranks_equal_a_sort(ranks, size):
    """Ties within a rank and between ranks, shards of unequal width, more candidates than a rank has, empty shards."""
    generator = torch.Generator().manual_seed(0)
    for width in (4, 23):
        logits = torch.randn(6, width, generator=generator)
        logits[:3] = (logits[:3] * 2).round() / 2
        logits[5] = 1.0
        rows = logits.tolist()
        for count in (1, 3, width):
            expected = [sorted(range(width), key=lambda token, row=row: (-row[token], token))[:count] for row in rows]
            for result in ranks(size).run(context_cases.vocabulary, logits=rows, count=count):
                assert result["tokens"].tolist() == expected
                assert torch.equal(result["values"], logits.gather(1, torch.tensor(expected)))
                torch.testing.assert_close(result["normaliser"], logits.logsumexp(dim=1))
                torch.testing.assert_close(result["sum"], logits.sum(dim=1))


@pytest.mark.parametrize("tokens", [[0, 7, 3, 3, 6, 0], [2], [], [7] * 5])
@pytest.mark.parametrize(("size", "vocab_size"), [(3, 8), (5, 3)])
def test_embedding_sends_rows_of_their_holders_only(ranks, size, vocab_size, tokens):
    tokens = [token % vocab_size for token in tokens]
    spans = cut_evenly(vocab_size, size)
    for rank, result in enumerate(ranks(size).run(context_cases.embedded, vocab_size=vocab_size, tokens=tokens)):
        assert result["rows"].tolist() == [[float(token)] * 3 for token in tokens]
        held = sum(spans[rank][0] <= token < spans[rank][1] for token in tokens)
        assert sum(result["traffic"].values()) == (size - 1) * held * 3 * 4


# ---- the harness itself ---------------------------------------------------------------------------------------------


def test_an_unexpected_error_is_reported_with_its_traceback(ranks):
    """The other ranks would wait for the failed one for a minute; the harness gives them seconds."""
    began = time.monotonic()
    with pytest.raises(RanksFailed, match=r"(?s)ZeroDivisionError: an accident.*in rank_zero_raises.*rank 1: did not"):
        ranks(2).run(context_cases.rank_zero_raises)
    assert time.monotonic() - began < 20
    assert [result["rank"] for result in ranks(2).run(context_cases.facts)] == [0, 1], "the group starts anew"


def test_a_rank_that_dies_is_named_by_the_others(ranks):
    """Where they were and whom they lost, not a stack of the transport's."""
    with pytest.raises(RanksFailed, match="rank 1: died with exit code 7") as caught:
        ranks(2).run(context_cases.rank_one_dies)
    expected = (
        r"rank 0: CommunicationError: rank 0 lost contact with rank 1 \(.*\) at layers.3.mlp.down_proj \(reduce\)"
    )
    assert re.search(expected, str(caught.value))


def test_a_rank_that_hangs_shows_where(ranks):
    with pytest.raises(RanksFailed, match=r"(?s)limit 2 s.*rank_one_hangs") as caught:
        ranks(2).run(context_cases.rank_one_hangs, timeout_s=2)
    assert str(caught.value).count("did not answer in time") == 2
