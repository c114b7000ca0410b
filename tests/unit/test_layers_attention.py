"""Attention cut over any number of ranks, in one process: the ranks' partial sums add up to the whole layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_lowbit.checkpoint.open import open_checkpoint
from megatron_lowbit.comm.sync_point import SyncPoint
from megatron_lowbit.config import ModelConfig
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


# ---- features, with heads dealt unevenly ----------------------------------------------------------------------------

PLAIN = ModelConfig("llama", 40, 8, 1, 9, 3, 8, 4, 64, 1e-5, 1e4, True)
SLIDING = dict(sliding_window=3, sliding_layers=(True,))
FEATURES = {
    "window": replace(PLAIN, **SLIDING),
    "soft cap": replace(PLAIN, attention_softcap=0.8, attention_scale=0.9),
    "soft cap and window": replace(PLAIN, attention_softcap=0.8, **SLIDING),
    "sinks": replace(PLAIN, attention_sinks=True),
    "sinks and window": replace(PLAIN, attention_sinks=True, attention_bias=True, **SLIDING),
    "normed heads": replace(PLAIN, qk_norm=True, norm_offset=1.0, rotary_dim=4, **SLIDING),
}


def shard_of(config: ModelConfig, rank: int, size: int) -> Attention:
    """Rank's part of one layer of random weights."""
    sources = tensor_sources(config)
    context = ParallelContext(rank, size, group=object() if size > 1 else None)  # type: ignore[arg-type]
    point = SyncPoint("layers.0.self_attn.o_proj", lambda partial_LTH, add_to_TH: add_to_TH.add_(partial_LTH[0]))
    prefix = "model.layers.0.self_attn"
    attention = Attention(context, config, sources, prefix, torch.float32, point, config.window_of(0))
    generator = torch.Generator().manual_seed(7)
    whole = {
        name: torch.randn(source.shape, generator=generator) / source.shape[-1] ** 0.5
        for name, source in sources.items()
        if name.startswith(prefix)
    }
    whole = {name: 4 * tensor if name.endswith("sinks") else tensor for name, tensor in whole.items()}

    def cut(source):
        if source.rule.dim is None:
            return whole[source.name]
        start, stop = source.rule.span(rank, size)
        return whole[source.name].narrow(source.rule.dim, start, stop - start)

    assign_parameters(
        attention, {name: torch.cat([cut(part) for part in parts]) for name, _, parts in sharded_parameters(attention)}
    )
    return attention


@pytest.mark.parametrize("size", [1, 2, 4, 5, 7, 11])
@pytest.mark.parametrize("feature", FEATURES)
def test_features_add_up_over_ranks_chunks_and_blocks(monkeypatch, feature, size):
    """One pass over two whole sequences on one rank, against chunks and decode steps on several, queries two by two."""
    config = FEATURES[feature]
    lengths = (12, 9)
    x = [torch.randn(length, 40, generator=torch.Generator().manual_seed(length)) for length in lengths]

    def step(starts, counts):
        new = torch.cat([rows[at : at + count] for rows, at, count in zip(x, starts, counts, strict=True)])
        return new, TokenBatch(torch.zeros(len(new), dtype=torch.int64), counts, starts)

    chunks = [((0, 0), (5, 2)), ((5, 2), (1, 4)), ((6, 6), (1, 1)), ((7, 7), (1, 1)), ((8, 8), (4, 1))]
    (whole,) = run(shard_of(config, 0, 1), config, [step((0, 0), lengths)])
    expected = whole.split(lengths)
    monkeypatch.setattr("megatron_lowbit.layers.attention._QUERIES_AT_ONCE", 2)
    steps = [step(*chunk) for chunk in chunks]
    by_rank = [run(shard_of(config, rank, size), config, steps) for rank in range(size)]
    for (starts, counts), *parts in zip(chunks, *by_rank, strict=True):
        got = sum(parts)
        rows = [expected[row][starts[row] : starts[row] + counts[row]] for row in range(2)]
        torch.testing.assert_close(got, torch.cat(rows), rtol=0, atol=TOLERANCE)
    plainer = replace(config, **WITHOUT[feature])
    (without,) = run(shard_of(plainer, 0, 1), plainer, [step((0, 0), lengths)])
    assert (without - whole).abs().max() > 0.01, "the feature does nothing here"


NO_WINDOW = dict(sliding_window=None, sliding_layers=())
WITHOUT = {
    "window": NO_WINDOW,
    "soft cap": dict(attention_softcap=None),
    "soft cap and window": NO_WINDOW,
    "sinks": dict(attention_sinks=False),
    "sinks and window": NO_WINDOW,
    "normed heads": dict(norm_offset=0.0),
}
