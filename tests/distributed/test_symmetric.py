"""The symmetric all-reduce over real processes: on one GPU between all of them, and why it is not used on a CPU."""

import pytest
import torch
from helpers import symmetric_cases
from helpers.messages import digest, draw_message

from megatron_lowbit.comm import reference, symmetric
from megatron_lowbit.comm.all_reduce import build_all_reduce
from megatron_lowbit.parallel import ParallelContext

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES = [pytest.param(size, marks=on_gpu) for size in (2, 3, 4)]
SCHEMES = ["int4-outlier", "int4-g64", "int8-g128", "int3-g64", "fp8-g128", "mxfp4", "nvfp4", "bf16", "exact"]
# the fast kernels and the general ones; fewer tokens than ranks, as many, and more; a row that programs share
MESSAGES = [
    *([seed, scheme, (1, 3, 4, 17)[seed % 4], (512, 1024, 576)[seed % 3]] for seed, scheme in enumerate(SCHEMES)),
    [20, "int5-asym", 5, 67],
    [21, "int4-g100-asym", 2, 1037],
    [22, "int4-outlier+int8-g128", 33, 2688],
    [23, "int4-g64", 0, 64],
    [24, "int4-g64", 150, 384],
]


def ran(results):
    """The ranks' results, unless symmetric memory cannot be had on this machine: all ranks say so alike."""
    reasons = {result["reason"] for result in results}
    assert len(reasons) == 1, f"ranks disagree: {reasons}"
    if reason := reasons.pop():
        pytest.skip(f"no symmetric memory here: {reason}")
    return results


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_gets_the_bits_of_the_reference(ranks, size):
    results = ran(ranks(size).run(symmetric_cases.messages, drawn=MESSAGES, timeout_s=200))
    for number, (seed, scheme, tokens, hidden) in enumerate(MESSAGES):
        message = draw_message(seed, size, scheme, tokens, hidden)
        expected = reference.all_reduce(message.partials, message.scheme, message.constants)
        rows = [result["rows"][number] for result in results]
        for rank, row in enumerate(rows):
            assert row["digest"] == digest(expected), f"rank {rank} of {message}"
            assert row["added"] == digest(1.0 + expected), f"rank {rank} of {message}, with a residual"
        # what goes out is counted as it is where messages are sent
        context = ParallelContext.virtual_ranks(size)
        build_all_reduce(context, message.scheme, message.partials[0].shape[1], message.constants)(
            torch.stack(message.partials)
        )
        for kind, virtual in (("traffic", context.traffic.sent_nbytes), ("messages", context.traffic.messages)):
            totals = {stage: sum(row[kind].get(stage, 0) for row in rows) for stage in virtual}
            assert totals == dict(virtual), f"{kind} of {message}"


@pytest.mark.parametrize("size", SIZES)
def test_replays_of_a_cuda_graph_follow_each_other(ranks, size):
    arguments = {"scheme": "int4-outlier", "tokens": 5, "hidden": 512, "count": 60}
    for result in ran(ranks(size).run(symmetric_cases.replays, timeout_s=200, **arguments)):
        assert result["wrong"] == []


@pytest.mark.parametrize("size", SIZES[:2])
def test_a_rank_that_does_not_come_turns_into_an_error(ranks, size):
    results = ran(ranks(size).run(symmetric_cases.lost_rank, timeout_s=120, wait_s=3.0))
    assert len({result["first"] for result in results}) == 1
    for rank, result in enumerate(results[:-1]):
        assert result["nan"], f"rank {rank}: what was not received must not look like a number"
        assert len(result["told"]) == 2
        for text in result["told"]:
            assert text.startswith(f"rank {rank} waited 3 s for rank ") and str(size - 1) in text, text


def test_ranks_on_cpus_learn_together_why_not(ranks):
    assert {result["reason"] for result in ranks(2).run(symmetric_cases.reasons)} == {
        "rank 0: tensors are on cpu; only GPUs have symmetric memory"
    }


def test_ranks_of_one_process_share_their_memory_anyway():
    assert symmetric.why_missing(ParallelContext.virtual_ranks(4)) == "all ranks are in one process"
    assert symmetric.why_missing(ParallelContext.single()) == "all ranks are in one process"
