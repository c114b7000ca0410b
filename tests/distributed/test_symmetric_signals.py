"""How kernels on several GPUs wait for each other: in Triton's interpreter, and in the code that is made for a GPU."""

import os
import re
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
import triton.language as tl  # noqa: E402

from lowbit_kernels import symmetric_signals as signals  # noqa: E402
from megatron_lowbit.sharding import cut_evenly  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter, in a process of its own, below")
FLAGS_NBYTES = 4 * signals.MAX_RANKS
RANKS = 3


@triton.jit
def _send(x_ptr, table_ptr, state_ptr, rank, ranks, nbytes, HARDWARE: tl.constexpr):
    """Writes a byte of `x_ptr` a program behind the flags of every rank, then signals."""
    epoch = tl.load(state_ptr + signals.EPOCH) + 1
    at = tl.program_id(0)
    for peer in range(ranks):
        buffer = tl.load(table_ptr + peer).to(tl.pointer_type(tl.uint8))
        tl.store(buffer + nbytes + rank * tl.num_programs(0) + at, tl.load(x_ptr + at))
    if signals.is_last(state_ptr + signals.TICKET, tl.num_programs(0), "sys"):
        signals.signal(state_ptr, table_ptr, 4 * rank, epoch, ranks, HARDWARE)


@triton.jit
def _receive(flags, out_ptr, state_ptr, status_ptr, ranks, timeout_ns, nbytes, size, HARDWARE: tl.constexpr):
    """Copies what arrived, a rank a program, and ends the call."""
    epoch = tl.load(state_ptr + signals.EPOCH) + 1
    if signals.wait(flags, state_ptr, status_ptr, epoch, ranks, timeout_ns, HARDWARE):
        for at in range(size):
            place = tl.program_id(0) * size + at
            tl.store(out_ptr + place, tl.load(flags.to(tl.pointer_type(tl.uint8)) + nbytes + place))
    if signals.is_last(state_ptr + signals.TICKET, tl.num_programs(0), "sys"):
        tl.store(state_ptr + signals.EPOCH, epoch)


@triton.jit
def _owners(out_ptr, tokens, ranks):
    token = tl.program_id(0)
    owner, start, count = signals.owner_of(token, tokens, ranks)
    tl.store(out_ptr + 3 * token, owner)
    tl.store(out_ptr + 3 * token + 1, start)
    tl.store(out_ptr + 3 * token + 2, count)


class Ranks:
    """RANKS ranks in one process, whose kernels run one after the other."""

    def __init__(self):
        self.buffers = [torch.zeros(FLAGS_NBYTES + 64, dtype=torch.uint8) for _ in range(RANKS)]
        self.table = torch.tensor([buffer.data_ptr() for buffer in self.buffers])
        self.states = [torch.zeros(signals.STATE_WORDS, dtype=torch.int32) for _ in range(RANKS)]
        self.status = [torch.zeros(RANKS, dtype=torch.int32) for _ in range(RANKS)]

    def send(self, rank, values):
        x = torch.tensor(values, dtype=torch.uint8)
        arguments = (x, self.table, self.states[rank], rank, RANKS, FLAGS_NBYTES)
        _send[(len(values),)](*arguments, HARDWARE=False)

    def receive(self, rank, size):
        out = torch.full((RANKS, size), 255, dtype=torch.uint8)
        arguments = (self.table[rank].item(), out, self.states[rank], self.status[rank], RANKS, 0, FLAGS_NBYTES, size)
        _receive[(RANKS,)](*arguments, HARDWARE=False)
        return out.tolist()


@interpreted
def test_what_was_sent_before_the_signal_arrives_call_after_call():
    ranks = Ranks()
    for call in range(1, 6):
        for rank in range(RANKS):
            ranks.send(rank, [10 * call + rank, call])
        for rank in range(RANKS):
            assert ranks.receive(rank, 2) == [[10 * call + sender, call] for sender in range(RANKS)]
    assert all(state.tolist() == [5, 0, 0, 0] for state in ranks.states)
    assert not torch.stack(ranks.status).any()


@interpreted
def test_numbers_of_calls_wrap_around():
    ranks = Ranks()
    for state, buffer in zip(ranks.states, ranks.buffers, strict=True):
        state[signals.EPOCH.value] = 2**31 - 2
        buffer[:FLAGS_NBYTES].view(torch.int32)[:RANKS] = 2**31 - 2
    for _ in range(4):
        for rank in range(RANKS):
            ranks.send(rank, [7])
        assert [ranks.receive(rank, 1) for rank in range(RANKS)] == [[[7]] * RANKS] * RANKS
    assert [state[0].item() for state in ranks.states] == [-(2**31) + 2] * RANKS


@interpreted
def test_a_rank_that_is_missing_is_named_and_everybody_fails():
    ranks = Ranks()
    ranks.send(0, [1])
    ranks.send(2, [1])
    assert ranks.receive(0, 1) == [[255]] * RANKS, "nothing may be read that was not waited for"
    assert ranks.status[0].tolist() == [0, 1, 0]
    assert ranks.states[0][signals.FAILED.value] == 1
    # rank 1 comes late: rank 0 has given up, and keeps silent in the next call, so that the others notice
    ranks.send(1, [1])
    for rank in (1, 2):
        assert ranks.receive(rank, 1) == [[1]] * RANKS
    for rank in range(RANKS):
        ranks.send(rank, [2])
    for rank in (1, 2):
        assert ranks.receive(rank, 1) == [[255]] * RANKS
        assert ranks.status[rank].tolist() == [1, 0, 0]


@interpreted
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_owners_are_those_of_every_other_collective(ranks):
    for tokens in (1, 2, 3, 4, 7, 8, 16, 33):
        out = torch.full((tokens, 3), -1, dtype=torch.int32)
        _owners[(tokens,)](out, tokens, ranks)
        expected = [
            [owner, start, stop - start]
            for owner, (start, stop) in enumerate(cut_evenly(tokens, ranks))
            for _ in range(start, stop)
        ]
        assert out.tolist() == expected


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_the_order_of_memory_in_the_code_for_a_gpu(tmp_path, monkeypatch):
    """Data, barrier, ticket (acquire and release), barrier, flags (release); flags (acquire), barrier, data."""
    backends = pytest.importorskip("triton.backends.compiler", reason="needs Triton 3.0 or later")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton was built without its NVIDIA backend")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {
        **{"x_ptr": "*u8", "table_ptr": "*i64", "state_ptr": "*i32", "flags": "i64", "out_ptr": "*u8"},
        **{"status_ptr": "*i32", "timeout_ns": "i64", "HARDWARE": "constexpr"},
    }

    def ptx(kernel):
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, {(kernel.arg_names.index("HARDWARE"),): True})
        target = backends.GPUTarget("cuda", 90, 32)
        return triton.compile(source, target=target, options={"num_warps": signals.WARPS}).asm["ptx"]

    send, receive = ptx(_send), ptx(_receive)
    barrier = r"bar\.sync\s+0;"
    ticket = r"atom\.global\.sys\.acq_rel\.add"
    assert re.search(rf"st\.global\.b8.*{barrier}.*{ticket}.*{barrier}.*st\.release\.sys\.global\.b32", send, re.DOTALL)
    assert not re.search(rf"{ticket}.*st\.global\.b8", send, re.DOTALL), "data must not follow the ticket"
    load = r"ld\.acquire\.sys\.global\.b32"
    assert re.search(rf"{load}.*{load}.*{barrier}.*ld\.global\.b8", receive, re.DOTALL)
    assert not re.search(rf"ld\.global\.b8.*{load}", receive, re.DOTALL), "data must not be read before the flags"
    for code in (send, receive):
        # over PCIe there are no atomics to another GPU: the only one is the ticket, in the rank's own memory
        assert len(re.findall(r"\b(?:atom|red)\.", code)) == 1
        assert not re.search(r"\btrap\b|\.nc\b", code), "nothing may end a program or read through a cache of constants"


def test_in_the_interpreter():
    """Triton reads TRITON_INTERPRET when it is imported, so its interpreter gets a process of its own."""
    if INTERPRETED:
        pytest.skip("this is that process")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "8 passed" in run.stdout, run.stdout
