"""Cases of the symmetric all-reduce, run on every rank of a RankGroup; those on a GPU share one between all ranks."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from helpers.messages import Message, digest, draw_message

from megatron_lowbit.comm import reference, symmetric
from megatron_lowbit.parallel import CommunicationError, ParallelContext
from megatron_lowbit.transport.base import TrafficCounter

#: Ranks take turns on the GPU, at its pace; and a loaded machine may be slow.
TIMEOUT_S = 60.0


def _on_gpu(context: ParallelContext) -> ParallelContext:
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"  # torch looks at it when buffers are mapped
    torch.cuda.set_device(0)
    return replace(context, device=torch.device("cuda", 0), traffic=TrafficCounter())


def _buffers(context: ParallelContext, messages: list[Message], timeout_s: float) -> symmetric.SymmetricBuffers:
    widest = 0
    for message in messages:
        hidden = message.partials[0].shape[1]
        for wire in (message.scheme.reduce_stage, message.scheme.gather_stage):
            assert wire is not None
            widest = max(widest, wire.packet_layout(hidden).row_nbytes)
    tokens = max(message.partials[0].shape[0] for message in messages)
    return symmetric.SymmetricBuffers(context, tokens, widest, timeout_s)


def _all_reduce(
    context: ParallelContext, message: Message, buffers: symmetric.SymmetricBuffers
) -> symmetric.SymmetricAllReduce:
    hidden = message.partials[0].shape[1]
    constants = message.constants.to(context.device)
    return symmetric.SymmetricAllReduce(context, message.scheme, hidden, constants, buffers, f"seed {message.seed}")


def reasons(context: ParallelContext) -> dict[str, Any]:
    """Why it is not used on these CPUs."""
    return {"reason": symmetric.why_missing(context)}


def messages(context: ParallelContext, drawn: list[list[Any]]) -> dict[str, Any]:
    """`drawn`: (seed, scheme, tokens, hidden) each; without and with a residual, one behind the other on one stream."""
    context = _on_gpu(context)
    if reason := symmetric.why_missing(context, share_gpus=True):
        return {"reason": reason}
    every = [draw_message(seed, context.size, scheme, tokens, hidden) for seed, scheme, tokens, hidden in drawn]
    buffers = _buffers(context, every, TIMEOUT_S)
    results = []
    for message in every:
        all_reduce = _all_reduce(context, message, buffers)
        mine = message.partials[context.rank].to(context.device)
        residual_TH = torch.ones(mine.shape, device=context.device)
        context.traffic.reset()
        full_TH = all_reduce(mine.unsqueeze(0))
        traffic = dict(context.traffic.sent_nbytes), dict(context.traffic.messages)
        results.append((full_TH, all_reduce(mine.unsqueeze(0), add_to_TH=residual_TH), traffic))
    buffers.check()
    rows = [
        {"digest": digest(full.cpu()), "added": digest(added.cpu()), "traffic": nbytes, "messages": count}
        for full, added, (nbytes, count) in results
    ]
    return {"reason": "", "rows": rows}


def replays(context: ParallelContext, scheme: str, tokens: int, hidden: int, count: int) -> dict[str, Any]:
    """Captures a call in a CUDA graph and replays it with new input each time; lists the replays that were wrong."""
    context = _on_gpu(context)
    if reason := symmetric.why_missing(context, share_gpus=True):
        return {"reason": reason}
    drawn = [draw_message(seed, context.size, scheme, tokens, hidden) for seed in range(count)]
    # one captured call has one set of constants and one dtype
    drawn = [
        replace(one, constants=drawn[0].constants, partials=[part.bfloat16() for part in one.partials]) for one in drawn
    ]
    buffers = _buffers(context, drawn, TIMEOUT_S)
    all_reduce = _all_reduce(context, drawn[0], buffers)
    partial_LTH = drawn[0].partials[context.rank].unsqueeze(0).to(context.device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        all_reduce(partial_LTH)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        full_TH = all_reduce(partial_LTH)
    wrong = []
    for turn, message in enumerate(drawn):
        partial_LTH.copy_(message.partials[context.rank])
        full_TH.fill_(torch.nan)
        graph.replay()
        expected = reference.all_reduce(message.partials, message.scheme, message.constants)
        if digest(full_TH.cpu()) != digest(expected):
            wrong.append(turn)
    buffers.check()
    return {"reason": "", "wrong": wrong}


def lost_rank(context: ParallelContext, wait_s: float) -> dict[str, Any]:
    """The last rank does not take part in the second call; what the others get, and what they are told."""
    context = _on_gpu(context)
    if reason := symmetric.why_missing(context, share_gpus=True):
        return {"reason": reason}
    message = draw_message(3, context.size, "int4-g64", tokens=2 * context.size, hidden=128)
    buffers = _buffers(context, [message], wait_s)
    all_reduce = _all_reduce(context, message, buffers)
    partial_LTH = message.partials[context.rank].unsqueeze(0).to(context.device)
    first = digest(all_reduce(partial_LTH).cpu())
    told: list[str] = []
    nan = True
    if context.rank != context.size - 1:
        nan = bool(all_reduce(partial_LTH).isnan().all())
        for action in (buffers.check, lambda: all_reduce(partial_LTH)):
            try:
                action()
            except CommunicationError as error:
                told.append(str(error))
    return {"reason": "", "first": first, "nan": nan, "told": told}
