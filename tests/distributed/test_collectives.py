"""All-reduces over real processes: every rank gets the bits of the reference, and the bytes that were promised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import comm_cases, golden
from helpers.messages import ALL_SCHEMES, Message, digest, draw_message

from megatron_lowbit.comm import reference
from megatron_lowbit.comm.all_reduce import build_all_reduce
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sharding import cut_evenly
from megatron_lowbit.transport.tcp_mesh import HEADER

SEEDS = {3: range(300), 2: range(1000, 1060), 5: range(2000, 2060)}
# ranks may run different codecs: packets and sums have the same bits
BACKENDS = ["auto", "torch"]


class Run:
    """The messages of one group size, and what each rank reported of them."""

    def __init__(self, ranks, size: int) -> None:
        self.size = size
        self.messages = [draw_message(seed, size) for seed in SEEDS[size]]
        results = ranks(size).run(comm_cases.messages, seeds=[*SEEDS[size]], backends=BACKENDS)
        self.rows: list[list[dict[str, Any]]] = [result["rows"] for result in results]

    def __iter__(self) -> Iterator[tuple[Message, list[dict[str, Any]]]]:
        """(message, its row of each rank)."""
        return zip(self.messages, (list(rows) for rows in zip(*self.rows, strict=True)), strict=True)


@pytest.fixture(scope="module", params=SEEDS)
def run(request, ranks) -> Run:
    return Run(ranks, request.param)


def test_the_messages_cover_what_they_should(run):
    """The comparisons below mean something only where every scheme, few tokens and odd values really occur."""
    assert {message.scheme.name for message in run.messages} == set(ALL_SCHEMES)
    tokens = {message.partials[0].shape[0] for message in run.messages}
    assert 0 in tokens and tokens & set(range(1, run.size)) and max(tokens) > 100
    hidden = {message.partials[0].shape[1] for message in run.messages}
    assert 1 in hidden and max(hidden) > 500
    assert any(not partial.isfinite().all() for message in run.messages for partial in message.partials)


def test_every_rank_gets_the_bits_of_the_reference(run):
    for message, rows in run:
        expected = reference.all_reduce(message.partials, message.scheme, message.constants)
        for rank, row in enumerate(rows):
            assert (row["shape"], row["dtype"]) == (list(expected.shape), "torch.float32"), f"rank {rank} of {message}"
            assert row["digest"] == digest(expected), f"rank {rank} of {message}"
            assert row["partial_kept"], f"rank {rank} of {message}: the caller's partial was written to"


def test_virtual_ranks_give_the_same_bits_and_count_the_same_traffic(run):
    for message, rows in run:
        context = ParallelContext.virtual_ranks(run.size)
        hidden = message.partials[0].shape[1]
        virtual = build_all_reduce(context, message.scheme, hidden, message.constants)(torch.stack(message.partials))
        assert digest(virtual) == rows[0]["digest"], str(message)
        for kind, of_virtual in (("traffic", context.traffic.sent_nbytes), ("messages", context.traffic.messages)):
            totals = {stage: sum(row[kind].get(stage, 0) for row in rows) for stage in rows[0][kind]}
            assert totals == of_virtual, f"{kind} of {message}"


def test_traffic_is_what_the_scheme_says(run):
    """Per rank and stage, from the packet rows of the independent implementation and the owners of tokens."""
    for message, rows in run:
        scheme, (tokens, hidden) = message.scheme, message.partials[0].shape
        stages = [scheme.reduce_stage] + ([] if scheme.gather_stage is None else [scheme.gather_stage])
        row_nbytes = [
            golden.row_nbytes(golden.Format(w.bits, w.group_size, w.outlier_count(hidden)), hidden) for w in stages
        ]
        owned = [stop - start for start, stop in cut_evenly(tokens, run.size)]
        assert sum(owned) == tokens
        for rank, row in enumerate(rows):
            if scheme.gather_stage is None:
                expected = {"reduce": (run.size - 1) * tokens * row_nbytes[0]}
            else:  # to each owner its tokens; as owner, my tokens to all others
                expected = {
                    "reduce": (tokens - owned[rank]) * row_nbytes[0],
                    "gather": (run.size - 1) * owned[rank] * row_nbytes[1],
                }
            assert row["traffic"] == expected, f"rank {rank} of {message}"
        total = sum(sum(row["traffic"].values()) for row in rows)
        # the mean over ranks is a multiple of 1/size; times size and tokens it is a whole number of bytes again
        promised = scheme.sent_nbytes_per_token(hidden, run.size) * run.size * tokens
        assert total == pytest.approx(promised, rel=1e-12, abs=0), str(message)


def test_the_counter_is_honest(run):
    """What the operating system really took equals what the context says it sent; one message a peer and stage."""
    for message, rows in run:
        for rank, row in enumerate(rows):
            count = sum(row["messages"].values())
            expected = sum(row["traffic"].values()) + HEADER.size * count
            assert row["counted"]["nbytes"] == expected, f"rank {rank} of {message}"
            assert count <= message.scheme.stages * (run.size - 1), f"rank {rank} of {message}"


def test_nan_and_inf_surface_on_all_ranks(run):
    """A value that is not finite on any rank is not finite in the sum: it never turns into a plausible number."""
    surfaced = 0
    for message, rows in run:
        bad = torch.stack([~partial.isfinite() for partial in message.partials]).any(dim=0)
        expected = set(bad.flatten().nonzero().flatten().tolist())
        for rank, row in enumerate(rows):
            assert expected <= set(row["not_finite"]), f"rank {rank} of {message}"
            surfaced += len(expected)
    assert surfaced
