"""Collectives that foretell and close the loop, over real processes: replicas and virtual ranks have the same bits."""

import pytest
from helpers import compensation_cases as cases
from helpers.messages import digest

from megatron_lowbit.comm.exchange import GATHER, REDUCE
from megatron_lowbit.parallel import ParallelContext

# (seed, tokens, hidden, norms behind the sums): none, one, fewer than ranks, several pieces, odd widths
DRAWN = [
    *([seed, tokens, 130, bool(seed % 2)] for seed, tokens in enumerate((0, 1, 2, 7, 33, 64, 5, 4, 3, 18, 1, 40))),
    [12, 700, 640, False],
    [13, 700, 640, True],
    [14, 260, 1031, False],
]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_rank_gets_the_bits_of_virtual_ranks(ranks, size):
    results = ranks(size).run(cases.chains, drawn=DRAWN)
    for number, (seed, tokens, hidden, normed) in enumerate(DRAWN):
        context = ParallelContext.virtual_ranks(size)
        chain = cases.draw_chain(seed, size, tokens, hidden, normed)
        expected = [digest(residual) for residual in chain.run(context)]
        rows = [result["rows"][number] for result in results]
        for rank, row in enumerate(rows):
            assert row["digests"] == expected, f"rank {rank}, {chain.scheme}, {tokens} tokens, norms {normed}"
        for stage in (REDUCE, GATHER):
            sent = sum(row["traffic"].get(stage, 0) for row in rows)
            assert sent == context.traffic.sent_nbytes.get(stage, 0), (stage, chain.scheme, tokens)
