"""The kernels of the symmetric all-reduce in Triton's interpreter: ranks share host memory, stages run one by one.

What this cannot show is the order of memory between real GPUs: see `test_symmetric_signals.py` for the code that is
made for it, and `test_symmetric.py` for ranks that really run at the same time.
"""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from helpers.messages import ALL_SCHEMES, MORE_SCHEMES, draw_message

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

from lowbit_kernels import PacketLayout, symmetric
from lowbit_kernels.symmetric_endpoint import Endpoint, buffer_nbytes, region_nbytes
from lowbit_kernels.symmetric_signals import EPOCH, FAILED, TICKET
from megatron_lowbit.comm import reference
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.comm.symmetric import SymmetricAllReduce, SymmetricBuffers, SymmetricUpToSize, unserved
from megatron_lowbit.parallel import CommunicationError, ParallelContext

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter, in a process of its own, below")
NAMES = [name for name in (*ALL_SCHEMES, *MORE_SCHEMES) if "one-stage" not in name]
TWO_STAGE = [name for name in NAMES if not unserved(parse_scheme(name))]


class Group:
    """Ranks of one process, with buffers for messages of up to `tokens` tokens in rows of `row_nbytes` bytes.

    programs: how many a device works on at once: few, so that each has several rows to do.
    """

    def __init__(self, ranks, tokens, row_nbytes, programs=3):
        region = region_nbytes(tokens, ranks, row_nbytes)
        self.buffers = [torch.zeros(buffer_nbytes(region) + 16, dtype=torch.uint8) for _ in range(ranks)]
        own = [buffer[-buffer.data_ptr() % 16 :][: buffer_nbytes(region)] for buffer in self.buffers]
        addresses = [buffer.data_ptr() for buffer in own]
        self.ends = [
            dataclasses.replace(Endpoint.make(rank, own[rank], addresses, tokens, region, 0), programs=programs)
            for rank in range(ranks)
        ]

    def all_reduce(self, message, add_to=None, missing=None):
        """What each rank gets. add_to: residuals, added to in place. missing: a rank that does not take part."""
        tokens, hidden = message.partials[0].shape
        constants, scheme = message.constants, message.scheme
        indices = constants.body_index, constants.outlier_index
        reduce_layout, gather_layout = (
            wire.packet_layout(hidden) for wire in (scheme.reduce_stage, scheme.gather_stage)
        )
        stage = symmetric.stage_of(reduce_layout, constants.reduce_scale_RD, constants.reduce_minimum_RD, *indices)
        gather = symmetric.stage_of(gather_layout, constants.gather_scale_1D, constants.gather_minimum_1D, *indices)
        outs = add_to or [torch.full((tokens, hidden), 7e7) for _ in self.ends]
        present = [end for end in self.ends if end.rank != missing]
        for end in present:
            symmetric.push_partials(end, message.partials[end.rank], stage)
        for end in present:
            symmetric.push_sums(end, tokens, stage, gather)
        for end in present:
            symmetric.take_sums(end, gather, outs[end.rank], add=add_to is not None)
        return outs


def same_bits(got, expected):
    return torch.equal(got.view(torch.int32), expected.view(torch.int32))


def row_nbytes(message):
    hidden = message.partials[0].shape[1]
    scheme = message.scheme
    return max(wire.packet_layout(hidden).row_nbytes for wire in (scheme.reduce_stage, scheme.gather_stage))


def expected(message):
    return reference.all_reduce(message.partials, message.scheme, message.constants)


@interpreted
@pytest.mark.parametrize("name", TWO_STAGE)
def test_every_scheme_on_every_rank_is_the_reference(name):
    seed = TWO_STAGE.index(name)
    ranks = 2 + seed % 2
    # rows of 64 values go the fast way, others the general one; tokens are fewer than ranks, and more
    message = draw_message(seed, ranks, name, tokens=(1, 4, 5)[seed % 3], hidden=(64, 64, 67, 64, 67)[seed % 5])
    group = Group(ranks, message.partials[0].shape[0], row_nbytes(message))
    for rank, got in enumerate(group.all_reduce(message)):
        assert same_bits(got, expected(message)), f"rank {rank} of {message}"


@interpreted
@pytest.mark.parametrize(("name", "hidden"), [("int4-outlier", 2688), ("nvfp4", 2112), ("int4-g100-asym", 1037)])
def test_rows_that_several_programs_share(name, hidden):
    message = draw_message(5, 3, name, tokens=4, hidden=hidden)
    group = Group(3, 4, row_nbytes(message))
    for got in group.all_reduce(message):
        assert same_bits(got, expected(message)), str(message)
    for end in group.ends:
        assert not end.tickets.any() and not end.state[TICKET.value]


@interpreted
def test_calls_of_all_sizes_and_formats_follow_each_other_on_the_same_buffers():
    ranks, most = 3, 7
    names = ["int4-g64", "int8-g128", "mxfp4", "bf16", "int3-group"]
    messages = [
        draw_message(seed, ranks, names[seed % len(names)], tokens=tokens, hidden=64 + 8 * (seed % 2))
        for seed, tokens in enumerate((2, 7, 0, 1, 5, 3))
    ]
    group = Group(ranks, most, max(map(row_nbytes, messages)))
    for message in messages:
        for rank, got in enumerate(group.all_reduce(message)):
            assert same_bits(got, expected(message)), f"rank {rank} of {message}"
    # a message without tokens launches nothing
    assert [end.state[EPOCH.value].item() for end in group.ends] == [5] * ranks


@interpreted
def test_sums_join_a_residual_in_place():
    message = draw_message(3, 2, "int4-g64", tokens=3, hidden=128)
    group = Group(2, 3, row_nbytes(message))
    residual_TH = torch.randn(3, 128)
    outs = group.all_reduce(message, add_to=[residual_TH.clone() for _ in range(2)])
    for got in outs:
        assert same_bits(got, residual_TH + expected(message))


@interpreted
@pytest.mark.parametrize("add", [False, True])
def test_where_a_rank_is_missing_nothing_looks_like_a_result(add):
    message = draw_message(4, 3, "int4-outlier", tokens=4, hidden=128)
    group = Group(3, 4, row_nbytes(message))
    assert not any(end.lost_ranks() for end in group.ends)
    residuals = [torch.zeros(4, 128) for _ in range(3)] if add else None
    outs = group.all_reduce(message, add_to=residuals, missing=1)
    for rank in (0, 2):
        assert outs[rank].isnan().all()
        # nobody has sums to send where rank 1 is missing, so in the end all are
        assert 1 in group.ends[rank].lost_ranks()
        assert group.ends[rank].state[FAILED.value] == 1
    # and it stays so, also when the rank is back
    outs = group.all_reduce(message)
    assert outs[0].isnan().all() and outs[2].isnan().all()


@interpreted
def test_the_collective_of_one_rank_with_itself():
    """What runs on the host in a call: all but other ranks."""
    message = draw_message(8, 1, "int4-outlier", tokens=3, hidden=128)
    context = ParallelContext.single()
    buffers = object.__new__(SymmetricBuffers)  # there is no symmetric memory on a CPU to make one from
    buffers._context, buffers._timeout_s = context, 2.5
    (buffers.endpoint,) = Group(1, 3, row_nbytes(message)).ends
    collective = SymmetricAllReduce(context, message.scheme, 128, message.constants, buffers, "layers.3.mlp")
    partial_LTH = message.partials[0].unsqueeze(0)
    for _ in range(2):
        assert same_bits(collective(partial_LTH), expected(message))
    residual_TH = torch.randn(3, 128)
    out_TH = collective(partial_LTH, add_to_TH=residual_TH)
    assert out_TH is residual_TH
    by_size = SymmetricUpToSize(collective, lambda partial_LTH, add_to_TH: "sent as messages")
    assert same_bits(by_size(partial_LTH), expected(message))
    assert by_size(torch.zeros(1, 4, 128)) == "sent as messages"
    assert context.traffic.sent_nbytes == {"reduce": 0, "gather": 0}
    buffers.endpoint.status[1, 0] = 1
    with pytest.raises(CommunicationError, match=r"rank 0 waited 2.5 s for rank 0 at or before layers.3.mlp"):
        collective(partial_LTH)
    with pytest.raises(ValueError, match="'int4:one-stage' has one stage"):
        one_stage = draw_message(8, 1, "int4:one-stage", tokens=3, hidden=128)
        SymmetricAllReduce(context, one_stage.scheme, 128, one_stage.constants, buffers)


@interpreted
def test_messages_beyond_what_was_reserved_are_refused():
    message = draw_message(6, 2, "int8-group", tokens=4, hidden=128)
    group = Group(2, 4, row_nbytes(message))
    group.all_reduce(message)
    longer = draw_message(6, 2, "int8-group", tokens=5, hidden=128)
    with pytest.raises(
        ValueError, match=r"5 tokens in rows of 130 bytes exceed .* for 2 ranks: 4 tokens, 576 bytes, so 4 "
    ):
        group.all_reduce(longer)
    wider = draw_message(6, 2, "int8-group", tokens=4, hidden=1280)
    with pytest.raises(ValueError, match=r"4 tokens in rows of 1300 bytes exceed .* so 0 of these; send fewer"):
        group.all_reduce(wider)
    for got in group.all_reduce(message):
        assert same_bits(got, expected(message)), "a refused message must leave no trace"
    # of shorter rows there may be as many, of longer ones fewer: 576 bytes are 3 rows of 192 for one rank's two tokens
    assert [group.ends[0].most_tokens(nbytes) for nbytes in (2, 130, 144, 145, 192, 288, 289)] == [4, 4, 4, 2, 2, 2, 0]


@interpreted
def test_values_that_do_not_fit_are_refused():
    end = Group(2, 4, 64).ends[0]
    stage = symmetric.stage_of(PacketLayout(64, 4, 32), None, None, None, None)
    for values in (torch.zeros(4, 32), torch.zeros(4, 64, dtype=torch.float16), torch.zeros(64, 4).t()):
        with pytest.raises(ValueError, match=r"x_TH is .*expected torch.float32 or torch.bfloat16 \[T, 64\] on cpu"):
            symmetric.push_partials(end, values, stage)
    with pytest.raises(ValueError, match=r"out_TH is torch.bfloat16 .*expected torch.float32"):
        symmetric.take_sums(end, stage, torch.zeros(4, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="at most 128 can share symmetric buffers"):
        Endpoint.make(0, end.own, [0] * 129, 4, end.region_nbytes, 0)
    with pytest.raises(ValueError, match="buffer of 1000 bytes"):
        Endpoint.make(0, end.own[:1000], [0, 0], 4, end.region_nbytes, 0)


def test_in_the_interpreter():
    """Triton reads TRITON_INTERPRET when it is imported, so its interpreter gets a process of its own."""
    if INTERPRETED:
        pytest.skip("this is that process")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(TWO_STAGE) + 10} passed" in run.stdout, run.stdout
