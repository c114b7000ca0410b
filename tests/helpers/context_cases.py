"""Cases of ParallelContext, run on every rank of a RankGroup."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_lowbit.comm.all_reduce import build_all_reduce
from megatron_lowbit.comm.constants import NO_CONSTANTS
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.layers.embedding import VocabParallelEmbedding
from megatron_lowbit.layers.sharded import assign_parameters
from megatron_lowbit.parallel import ParallelContext, RankError
from megatron_lowbit.sharding import ShardRule, TensorSource
from megatron_lowbit.vocab_parallel import log_normaliser, sum_over_ranks, top_candidates


def _message(action: Callable[[], object], *errors: type[Exception]) -> str:
    try:
        action()
    except errors as error:
        return str(error)
    return ""


def facts(context: ParallelContext) -> dict[str, Any]:
    return {
        "rank": context.rank,
        "size": context.size,
        "first": context.is_first,
        "local": list(context.local_ranks),
        "shard": list(context.shard),
    }


def json_values(context: ParallelContext) -> dict[str, Any]:
    """Values of very different lengths, with letters beyond ASCII."""
    mine = {"rank": context.rank, "text": "ä€😀" * 100 * context.rank, "none": None, "list": [1.5, True]}
    return {"all": context.all_gather_json(mine), "first": context.broadcast_json(mine)}


def gathered(context: ParallelContext, shape: list[int], dtype: str) -> dict[str, Any]:
    mine = torch.full(shape, context.rank + 1).to(getattr(torch, dtype))
    before = mine.clone()
    result = context.all_gather(mine, "test")
    return {
        "gathered": result,
        "kept": torch.equal(mine, before),
        "traffic": context.traffic.sent_nbytes,
        "messages": context.traffic.messages,
    }


def agreements(context: ParallelContext, problems: list[str | None]) -> dict[str, Any]:
    return {"message": _message(lambda: context.agree(problems[context.rank]), RankError)}


def same(context: ParallelContext, values: list[Any]) -> dict[str, Any]:
    return {"message": _message(lambda: context.agree_same(values[context.rank], "the setting"), RankError)}


def work_together(context: ParallelContext, failing: list[int], error: str) -> dict[str, Any]:
    """`together` with work that fails on some ranks; a later collective shows that all left it alike."""

    def work() -> int:
        if context.rank in failing:
            raise {"ValueError": ValueError, "OSError": OSError}[error](f"no luck on {context.rank}")
        return context.rank

    results: list[int] = []
    message = _message(lambda: results.append(context.together(work)), RankError)
    return {"message": message, "results": results, "after": context.all_gather_json(context.rank)}


def vocabulary(context: ParallelContext, logits: list[list[float]], count: int) -> dict[str, Any]:
    """Candidates and normaliser of logits whose columns are cut over the ranks."""
    whole = torch.tensor(logits)
    start, stop = ShardRule(dim=1, units=whole.shape[1]).span(*context.shard)
    values, tokens = top_candidates(context, whole[:, start:stop], start, count, "test")
    return {
        "values": values,
        "tokens": tokens,
        "normaliser": log_normaliser(context, whole[:, start:stop], "test"),
        "sum": sum_over_ranks(context, whole[:, start:stop].sum(dim=1), "test"),
    }


def embedded(context: ParallelContext, vocab_size: int, tokens: list[int]) -> dict[str, Any]:
    """Vectors of tokens, row `t` of the table being t in every feature, and the bytes that were sent for them."""
    source = TensorSource("table", (vocab_size, 3), ShardRule(dim=0, units=vocab_size))
    layer = VocabParallelEmbedding(context, source, torch.float32)
    start, stop = source.rule.span(*context.shard)
    assign_parameters(layer, {"weight": torch.arange(start, stop).float()[:, None].expand(-1, 3).contiguous()})
    context.traffic.reset()
    return {"rows": layer(torch.tensor(tokens, dtype=torch.int64)), "traffic": context.traffic.sent_nbytes}


def rank_zero_raises(context: ParallelContext) -> dict[str, Any]:
    """Rank 0 fails with an error nobody expected; the others wait for it in a collective."""
    if context.is_first:
        raise ZeroDivisionError("an accident")
    context.barrier()
    return {}


def rank_one_dies(context: ParallelContext) -> dict[str, Any]:
    """In the middle of a forward pass, so to say: the others are at a sync point."""
    scheme = parse_scheme("int4-group")
    all_reduce = build_all_reduce(context, scheme, 8, NO_CONSTANTS, name="layers.3.mlp.down_proj")
    if context.rank == 1:
        os._exit(7)
    all_reduce(torch.ones(1, 4, 8))
    return {}


def rank_one_hangs(context: ParallelContext) -> dict[str, Any]:
    if context.rank == 1:
        time.sleep(600)
    context.barrier()
    return {}
