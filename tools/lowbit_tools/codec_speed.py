"""How fast one rank encodes and decodes: the machine constant that a plan needs beside arithmetic and links."""

from __future__ import annotations

import time

import torch

from lowbit_tools.all_reduce_bench import Message
from megatron_lowbit.comm.exchange import AUTOMATIC
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.comm.workspace import Workspace
from megatron_lowbit.parallel import ParallelContext

TOKENS, ROUNDS = 512, 9


def codec_nbytes_per_s(scheme: CommScheme, hidden: int, device: torch.device, backend: str) -> float:
    """Bytes that this scheme's codec touches in a second: two virtual ranks' messages of 512 tokens, best of 9 rounds.

    Counted are the values and packets that each step must read and write once.
    """
    context = ParallelContext.virtual_ranks(2, device)
    message = Message(context, TOKENS, hidden)
    partial_LTH = torch.stack(message.partials).to(device)
    all_reduce = message.all_reduce(scheme, backend, None, AUTOMATIC, Workspace())
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        all_reduce(partial_LTH)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    reduce_row = scheme.reduce_stage.packet_layout(hidden).row_nbytes
    # encode twice (bf16 to packet), then decode_sum (packets to fp32)
    row_nbytes = 2 * (2 * hidden + reduce_row) + 2 * reduce_row + 4 * hidden
    if scheme.gather_stage is not None:  # encode the fp32 sum, decode it
        row_nbytes += 2 * (4 * hidden + scheme.gather_stage.packet_layout(hidden).row_nbytes)
    return TOKENS * row_nbytes / best
