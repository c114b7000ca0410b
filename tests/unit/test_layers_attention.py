"""Attention cut over any number of ranks, in one process: the ranks' partial sums add up to the whole layer."""

from __future__ import annotations

import pytest
import torch

from megatron_lowbit.checkpoint.open import open_checkpoint
from megatron_lowbit.comm.sync_point import SyncPoint
from megatron_lowbit.layers.attention import Attention
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.layers.rotary import Rotary
from megatron_lowbit.layers.sharded import assign_parameters, sharded_parameters
from megatron_lowbit.models.registry import tensor_sources
from megatron_lowbit.parallel import ParallelContext

CPU = torch.device("cpu")
# FP32 sums in another order, derived in test_models_virtual_tp; a single layer here
TOLERANCE = 1e-5


def attention_of(folder, rank: int, size: int) -> Attention:
    """Rank's part of the first layer's attention, its sync point handing out the partial sum."""
    reader = open_checkpoint(folder)
    context = ParallelContext(rank, size, group=object() if size > 1 else None)  # type: ignore[arg-type]
    point = SyncPoint("layers.0.self_attn.o_proj", lambda partial_LTH, add_to_TH: add_to_TH.add_(partial_LTH[0]))
    attention = Attention(
        context, reader.config, tensor_sources(reader.config), "model.layers.0.self_attn", torch.float32, point
    )
    tensors = {}
    for name, _, sources in sharded_parameters(attention):
        cut = [
            reader.read(source.name)
            if source.rule.dim is None
            else reader.read_span(source.name, source.rule.dim, *source.rule.span(rank, size))
            for source in sources
        ]
        tensors[name] = torch.cat(cut)
    assign_parameters(attention, tensors)
    attention.o_proj.bias = None  # joins once behind the sum, see test_layers
    return attention


def run(attention: Attention, config, steps: list[tuple[torch.Tensor, TokenBatch]]) -> list[torch.Tensor]:
    """Partial sums of each step, over one cache for all of them."""
    rotary = Rotary(config, CPU)
    sequences = len(steps[0][1].lengths)
    cache = tuple(torch.zeros(sequences, attention.num_kv_heads, 20, config.head_dim) for _ in range(2))
    return [attention(x, torch.zeros_like(x), rotary.tables(batch), batch, cache, None) for x, batch in steps]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8, 9, 11])
@pytest.mark.parametrize("variant", ["odd", "biased", "sparse"])
def test_partial_sums_of_all_ranks_add_up(tiny_models, variant, size):
    """Prefill, decode and a chunk behind it; groups of query heads are cut unevenly at most of these sizes."""
    config = open_checkpoint(tiny_models(variant)).config
    generator = torch.Generator().manual_seed(size)

    def step(lengths, starts):
        tokens = torch.zeros(sum(lengths), dtype=torch.int64)
        x = torch.randn(sum(lengths), config.hidden_size, generator=generator)
        return x, TokenBatch(tokens, lengths, starts)

    steps = [
        step((5, 3), (0, 0)),
        step((1, 1), (5, 3)),
        step((1, 1), (6, 4)),
        step((4, 2), (7, 5)),
        step((1, 1), (11, 7)),
    ]
    expected = run(attention_of(tiny_models(variant), 0, 1), config, steps)
    by_rank = [run(attention_of(tiny_models(variant), rank, size), config, steps) for rank in range(size)]
    for whole, *parts in zip(expected, *by_rank, strict=True):
        torch.testing.assert_close(sum(parts), whole, rtol=0, atol=TOLERANCE)
        assert whole.abs().mean() > 0.05


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads"),
    [
        (1, [9], [3]),
        (2, [5, 4], [2, 2]),  # heads 3 and 4 belong to the middle key-value head, which both ranks hold
        (3, [3, 3, 3], [1, 1, 1]),
        (4, [3, 2, 2, 2], [1, 1, 2, 1]),
        (5, [2, 2, 2, 2, 1], [1, 2, 1, 1, 1]),
    ],
)
def test_heads_of_each_rank(tiny_models, size, heads, kv_heads):
    ranks = [attention_of(tiny_models("odd"), rank, size) for rank in range(size)]
    assert [attention.num_heads for attention in ranks] == heads
    assert [attention.num_kv_heads for attention in ranks] == kv_heads


def test_a_rank_without_heads_adds_nothing(tiny_models):
    attention = attention_of(tiny_models("sparse"), 2, 3)
    config = open_checkpoint(tiny_models("sparse")).config
    assert (attention.num_heads, attention.num_kv_heads) == (0, 0)
    for length in (4, 1):
        x = torch.randn(length, 32)
        (partial,) = run(attention, config, [(x, TokenBatch(torch.zeros(length, dtype=torch.int64), (length,), (0,)))])
        assert partial.shape == (length, 32) and not partial.any()
