"""Formats whose features are rotated, over real processes: every rank gets the bits of the reference."""

import pytest
import torch
from helpers import comm_cases
from helpers.messages import ROTATED_SCHEMES, digest, draw_message

from megatron_lowbit.comm import reference
from megatron_lowbit.comm.all_reduce import build_all_reduce
from megatron_lowbit.parallel import ParallelContext

SEEDS = {2: range(60), 3: range(100, 160)}


@pytest.mark.parametrize("size", SEEDS)
def test_real_and_virtual_ranks_equal_the_reference(ranks, size):
    seeds = [*SEEDS[size]]
    results = ranks(size).run(comm_cases.messages, seeds=seeds, backends=["auto", "torch"], schemes=ROTATED_SCHEMES)
    not_finite = 0
    for number, seed in enumerate(seeds):
        message = draw_message(seed, size, ROTATED_SCHEMES[seed % len(ROTATED_SCHEMES)])
        hidden, tokens = message.partials[0].shape[1], message.partials[0].shape[0]
        expected = reference.all_reduce(message.partials, message.scheme, message.constants)
        rows = [result["rows"][number] for result in results]
        for rank, row in enumerate(rows):
            assert row["digest"] == digest(expected), f"rank {rank} of {message}"
            assert row["partial_kept"], f"rank {rank} of {message}: the caller's partial was written to"
        context = ParallelContext.virtual_ranks(size)
        virtual = build_all_reduce(context, message.scheme, hidden, message.constants)
        assert digest(virtual(torch.stack(message.partials))) == digest(expected), f"virtual ranks, {message}"
        bad = torch.stack([~partial.isfinite() for partial in message.partials]).any(dim=0)
        assert expected[bad].isfinite().sum() == 0, f"{message}: a value that is not finite became a number"
        not_finite += int(bad.sum())
        sent = sum(sum(row["traffic"].values()) for row in rows)
        assert sent == sum(context.traffic.sent_nbytes.values()), str(message)
        assert sent == pytest.approx(message.scheme.sent_nbytes_per_token(hidden, size) * size * tokens)
    assert not_finite
