"""Triton: how kernels on several GPUs wait for each other. What the stages in `symmetric.py` begin and end with.

Every GPU has a buffer that the others can write to. At its start lie two rows of R flags, one a stage: flag r holds the
number of the last call of which rank r has sent everything. A rank's state, in its own memory, is the number of calls
it has finished, a ticket counter and a flag for failure. Nothing of it is touched by the host, so replays of a CUDA
graph go on counting where the last one ended.

Order of memory: a program of a kernel writes packets, its threads meet at a barrier, and it takes a ticket (acquire and
release at system scope). The program with the last ticket has thereby seen that all others are done; it stores the
flags (release, system scope). Whoever reads a flag (acquire, system scope) sees every packet written before it.
Only plain stores go to other GPUs: over PCIe there are no atomics.

No program waits for another one of its own kernel, and what it waits for was launched before it on every GPU. So no
grid is too large, whatever fits on the device at once, as long as ranks have a GPU each. Ranks that share a GPU depend
on it to switch between processes, which it does, if slowly.

Legend: R ranks.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

#: What a rank's state holds, int32 each.
EPOCH, TICKET, FAILED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
STATE_WORDS = 4
#: Threads of a program, and so the most ranks whose flags it can look at, one a thread.
WARPS = 4
THREADS = tl.constexpr(32 * WARPS)
MAX_RANKS = 32 * WARPS


@triton.jit
def owner_of(token: tl.tensor, tokens: tl.tensor, ranks: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(owner of a token, its first token, the number of its tokens): consecutive blocks, the first ones longer."""
    short = tokens // ranks
    longer = tokens % ranks
    edge = longer * (short + 1)
    owner = tl.where(token < edge, token // (short + 1), longer + (token - edge) // tl.maximum(short, 1))
    return owner, owner * short + tl.minimum(owner, longer), short + (owner < longer).to(tl.int32)


@triton.jit
def wait(
    flags: tl.tensor,
    state_ptr: tl.tensor,
    status_ptr: tl.tensor,
    epoch: tl.tensor,
    ranks: tl.tensor,
    timeout_ns: tl.tensor,
    HARDWARE: tl.constexpr,
) -> tl.tensor:
    """1 when all `ranks` flags (int32, from address `flags` on) have reached `epoch`, 0 when that took too long.

    Then the ranks that are missing are marked at `status_ptr`, and no later kernel of this rank waits or signals.
    """
    lane = tl.arange(0, THREADS)
    mine = lane < ranks
    address = flags + 4 * tl.where(mine, lane, 0)
    missing = mine & (_load_acquire(address, HARDWARE) - epoch < 0)  # a difference, since numbers wrap around
    waiting = tl.max(missing.to(tl.int32), 0)
    reached = 1
    if HARDWARE:
        began = globaltimer()
    while waiting > 0:
        late = tl.load(state_ptr + FAILED, volatile=True) != 0
        if HARDWARE:  # noqa: SIM108  # what is not compiled must not be looked at
            late = late | (globaltimer() - began > timeout_ns)
        else:
            late = late | (waiting > 0)  # interpreted, stages run one after the other: nobody is on the way
        if late:
            tl.store(state_ptr + FAILED, 1)
            tl.store(status_ptr + lane, 1, mask=missing)
            reached = 0
            waiting = 0
        else:
            missing = mine & (_load_acquire(address, HARDWARE) - epoch < 0)
            waiting = tl.max(missing.to(tl.int32), 0)
    tl.debug_barrier()  # what one thread has seen holds for all
    return reached


@triton.jit
def is_last(ticket_ptr: tl.tensor, tickets: tl.tensor, SCOPE: tl.constexpr) -> tl.tensor:
    """True in the last of `tickets` programs to get here, which then sees all that the others wrote before.

    SCOPE: "sys" where any of that is in the memory of other GPUs, else "gpu", which takes less time.
    """
    tl.debug_barrier()  # all threads of this program are done
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope=SCOPE) == tickets - 1
    if last:
        tl.store(ticket_ptr, 0)  # for the next kernel
    return last


@triton.jit
def signal(
    state_ptr: tl.tensor,
    table_ptr: tl.tensor,
    flag_offset: tl.tensor,
    epoch: tl.tensor,
    ranks: tl.tensor,
    HARDWARE: tl.constexpr,
) -> None:
    """By the last program: sets the flag `flag_offset` bytes into every rank's buffer, unless something failed here.

    table_ptr: int64 addresses of the R buffers. A rank that fails keeps silent, so that the others fail too.
    """
    if tl.load(state_ptr + FAILED, volatile=True) == 0:
        lane = tl.arange(0, THREADS)
        mine = lane < ranks
        address = tl.load(table_ptr + lane, mask=mine, other=0) + flag_offset
        _store_release(address, epoch + 0 * lane, mine, HARDWARE)


@triton.jit
def _load_acquire(address: tl.tensor, HARDWARE: tl.constexpr) -> tl.tensor:
    if HARDWARE:
        value = tl.inline_asm_elementwise(
            "ld.acquire.sys.global.b32 $0, [$1];", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        value = tl.load(address.to(tl.pointer_type(tl.int32)))
    return value


@triton.jit
def _store_release(address: tl.tensor, value: tl.tensor, mask: tl.tensor, HARDWARE: tl.constexpr) -> None:
    if HARDWARE:
        tl.inline_asm_elementwise(
            "{ .reg .pred %p; setp.ne.b32 %p, $3, 0; @%p st.release.sys.global.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [address, value, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(address.to(tl.pointer_type(tl.int32)), value, mask=mask)
