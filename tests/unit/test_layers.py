"""Linear layers, norm, rotary embedding, vocabulary: each against its formula or transformers."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron_lowbit.checkpoint.open import open_checkpoint
from megatron_lowbit.comm.sync_point import SyncPoint
from megatron_lowbit.config import ModelConfig, RopeScaling
from megatron_lowbit.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from megatron_lowbit.layers.norm import RMSNorm, nvidia_apex_is_installed
from megatron_lowbit.layers.rotary import Rotary, inverse_frequencies, rotate
from megatron_lowbit.layers.sharded import assign_parameters
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sharding import ShardRule, TensorSource

F32, CPU = torch.float32, torch.device("cpu")
SINGLE = ParallelContext.single()


def rank_of(rank: int, size: int) -> ParallelContext:
    return ParallelContext(rank, size, group=object())  # type: ignore[arg-type]  # nothing is sent


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# ---- linear ---------------------------------------------------------------------------------------------------------

UP = {
    "up.weight": TensorSource("up.weight", (7, 4), ShardRule(dim=0, units=7)),
    "up.bias": TensorSource("up.bias", (7,), ShardRule(dim=0, units=7)),
    "gate.weight": TensorSource("gate.weight", (5, 4), ShardRule(dim=0, units=5)),
    "gate.bias": TensorSource("gate.bias", (5,), ShardRule(dim=0, units=5)),
}
DOWN = {
    "down.weight": TensorSource("down.weight", (4, 7), ShardRule(dim=1, units=7)),
    "down.bias": TensorSource("down.bias", (4,)),
}


def test_column_parallel_gives_each_rank_its_outputs():
    weight, bias, x = randn(7, 4), randn(7), randn(3, 4)
    parts = []
    for rank, span in enumerate([(0, 3), (3, 5), (5, 7)]):
        layer = ColumnParallelLinear(rank_of(rank, 3), UP, ("up",), F32)
        assign_parameters(layer, {"weight": weight[slice(*span)], "bias": bias[slice(*span)]})
        parts.append(layer(x))
    torch.testing.assert_close(torch.cat(parts, dim=1), x @ weight.T + bias)


def test_merged_columns_come_apart_again():
    weights, biases, x = [randn(5, 4), randn(7, 4)], [randn(5), randn(7)], randn(3, 4)
    layer = MergedColumnParallelLinear(SINGLE, UP, ("gate", "up"), F32)
    assign_parameters(layer, {"weight": torch.cat(weights), "bias": torch.cat(biases)})
    for got, weight, bias in zip(layer(x), weights, biases, strict=True):
        torch.testing.assert_close(got, x @ weight.T + bias)
    # at 6 ranks the last one holds nothing of the gate and one feature of up
    assert MergedColumnParallelLinear(rank_of(5, 6), UP, ("gate", "up"), F32).split_sizes == [0, 1]


def row_parallel(context, weight, bias, seen) -> RowParallelLinear:
    def all_reduce(partial_LTH, add_to_TH):
        seen.append(partial_LTH)
        return add_to_TH.add_(partial_LTH.sum(dim=0))

    tensors = DOWN if bias is not None else {"down.weight": DOWN["down.weight"]}
    layer = RowParallelLinear(context, tensors, "down", F32, SyncPoint("down", all_reduce))
    assign_parameters(layer, {"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer


@pytest.mark.parametrize("size", [2, 3, 9])
def test_row_parallel_partials_of_virtual_and_real_ranks(size):
    """Virtual ranks cut the columns themselves; ranks beyond the 7 features have a partial of zeros."""
    weight, bias, x, residual = randn(4, 7), randn(4), randn(3, 7), randn(3, 4)
    seen: list[torch.Tensor] = []
    virtual = row_parallel(ParallelContext.virtual_ranks(size), weight, bias, seen)
    got = virtual(x, residual.clone(), residual, None)
    assert seen[0].shape == (size, 3, 4)
    torch.testing.assert_close(got, residual + x @ weight.T + bias)
    for rank in range(size):
        start, stop = DOWN["down.weight"].rule.span(rank, size)
        partial = row_parallel(rank_of(rank, size), weight[:, start:stop], bias, seen).partial(x[:, start:stop])
        assert partial.shape == (1, 3, 4)
        torch.testing.assert_close(partial[0], seen[0][rank])
        if start == stop:
            assert not seen[0][rank].any()


def test_row_parallel_bias_is_added_once_and_kept_in_fp32():
    layer = row_parallel(ParallelContext.virtual_ranks(3), torch.zeros(4, 7), torch.tensor([1.0, 2.0, 3.0, 4.0]), [])
    assert layer(randn(2, 7), torch.zeros(2, 4), randn(2, 4), None).tolist() == [[1.0, 2.0, 3.0, 4.0]] * 2
    no_bias = row_parallel(ParallelContext.virtual_ranks(3), torch.zeros(4, 7), None, [])
    assert no_bias.bias is None and not no_bias(randn(2, 7), torch.zeros(2, 4), randn(2, 4), None).any()
    bf16 = RowParallelLinear(
        SINGLE, DOWN, "down", torch.bfloat16, SyncPoint("down", lambda partial, add_to: add_to.add_(partial[0]))
    )
    assert bf16.weight.dtype == torch.bfloat16
    assert bf16.bias is not None and bf16.bias.dtype == F32


def test_assignment_is_strict():
    layer = ColumnParallelLinear(SINGLE, UP, ("up",), F32)
    for tensors in (
        {"weight": randn(7, 4)},
        {"weight": randn(7, 4), "bias": randn(7), "more": randn(1)},
        {"weight": randn(6, 4), "bias": randn(7)},
        {"weight": randn(7, 4).bfloat16(), "bias": randn(7)},
    ):
        with pytest.raises(AssertionError):
            assign_parameters(layer, tensors)


def at(positions: torch.Tensor) -> TokenBatch:
    """A batch of single tokens at these positions."""
    return TokenBatch(torch.zeros_like(positions), (1,) * len(positions), tuple(positions.tolist()))


# ---- norm and rotary ------------------------------------------------------------------------------------------------


def test_norm_equals_transformers():
    theirs = LlamaRMSNorm(33, eps=1e-5)
    theirs.weight.data = randn(33)
    ours = RMSNorm(SINGLE, TensorSource("norm.weight", (33,)), 1e-5, F32)
    assign_parameters(ours, {"weight": theirs.weight.data})
    x = randn(5, 33) * 100
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    x[2] = 0.0
    assert not ours(x)[2].any()


def test_norm_of_a_bf16_model_is_rounded_once():
    """Computed in FP32 from the FP32 residual, then one rounding; two would miss the nearest bf16 number often."""
    ours = RMSNorm(SINGLE, TensorSource("norm.weight", (33,)), 1e-5, torch.bfloat16)
    weight, x = randn(33), randn(5, 33)
    assign_parameters(ours, {"weight": weight})
    exact = x.double() / (x.double().pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight
    got = ours(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, exact.bfloat16())


def test_some_other_apex_is_not_taken_for_nvidias(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "apex" else real(name))
    assert not nvidia_apex_is_installed()


@pytest.mark.parametrize("variant", ["odd", "biased"])
def test_rotary_equals_transformers(tiny_models, variant):
    config = open_checkpoint(tiny_models(variant)).config
    assert (config.rope_scaling is not None) == (variant == "biased")
    theirs = LlamaRotaryEmbedding(tiny_models.hf(variant).config)
    torch.testing.assert_close(inverse_frequencies(config), theirs.inv_freq, rtol=1e-6, atol=0)
    positions = torch.tensor([0, 1, 5, 31, 32, 95])
    query = randn(6, 3, config.head_dim)
    cos, sin = theirs(query, positions[None])
    expected, _ = apply_rotary_pos_emb(query.transpose(0, 1)[None], query.transpose(0, 1)[None], cos, sin)
    got = rotate(query, Rotary(config, CPU).tables(at(positions)))
    torch.testing.assert_close(got, expected[0].transpose(0, 1), rtol=0, atol=1e-5)
    assert torch.equal(got[0], query[0]), "position 0 turns nothing"


def test_scaled_frequencies_by_hand():
    """Wavelengths below 128/4 stay, above 128/1 are stretched 4 times, between them it changes over smoothly."""
    config = ModelConfig(
        "llama", 8, 8, 1, 1, 1, 8, 4, 512, 1e-5, 10000.0, True, RopeScaling("llama3", 4.0, 128, 1.0, 4.0)
    )
    # wavelengths 2 pi / 10^-i: 6.28 stays; 62.8 has 128 / 62.8 = 2.0372 turns, a share of (2.0372 - 1) / (4 - 1) =
    # 0.34573 of its frequency is kept and the rest divided by 4: 0.1 * (0.34573 + 0.65427 / 4) = 0.05093
    expected = [1.0, 0.05093, 0.01 / 4, 0.001 / 4]
    assert inverse_frequencies(config).tolist() == pytest.approx(expected, rel=1e-4)


def test_scaling_without_meaning_is_refused():
    with pytest.raises(ValueError, match=r"high_freq_factor 1\.0 must be above"):
        RopeScaling("llama3", 4.0, 24, 1.0, 1.0)


def test_rotation_keeps_lengths_and_relative_positions():
    config = ModelConfig("llama", 8, 8, 1, 1, 1, 8, 4, 96, 1e-5, 100.0, True)
    query, key = randn(1, 1, 8), randn(1, 2, 8)[:, :1]
    rotary = Rotary(config, CPU)

    def product(a: int, b: int) -> float:
        left, right = (rotate(x, rotary.tables(at(torch.tensor([place])))) for x, place in ((query, a), (key, b)))
        return float((left * right).sum())

    assert product(3, 10) == pytest.approx(product(40, 47), abs=1e-5)
    assert abs(product(3, 10) - product(3, 11)) > 1e-3


# ---- vocabulary -----------------------------------------------------------------------------------------------------

TABLE = TensorSource("table", (10, 4), ShardRule(dim=0, units=10))


def test_embedding_of_one_process_and_of_virtual_ranks():
    weight = randn(10, 4)
    for context in (SINGLE, ParallelContext.virtual_ranks(3)):
        layer = VocabParallelEmbedding(context, TABLE, F32)
        assign_parameters(layer, {"weight": weight})
        tokens = torch.tensor([9, 0, 0, 3])
        assert torch.equal(layer(tokens), weight[tokens])


def test_heads_of_all_ranks_make_the_whole_vocabulary():
    weight, hidden = randn(10, 4), randn(3, 4)
    heads = [
        VocabParallelHead(rank_of(rank, 12), weight[slice(*TABLE.rule.span(rank, 12))], TABLE) for rank in range(12)
    ]
    assert [head.start for head in heads[:10]] == list(range(10)) and heads[11].vocab_size == 10
    for kind in ("logits", "precise_logits"):
        parts = [getattr(head, kind)(hidden) for head in heads]
        assert [part.shape[1] for part in parts] == [1] * 10 + [0, 0]
        torch.testing.assert_close(torch.cat(parts, dim=1), hidden @ weight.T)


def test_precise_logits_do_not_round_to_bf16():
    """Also where the vocabulary is longer than the block that is widened at a time."""
    source = TensorSource("table", (9001, 4), ShardRule(dim=0, units=9001))
    weight, hidden = randn(9001, 4).bfloat16(), randn(2, 4).bfloat16()
    head = VocabParallelHead(SINGLE, weight, source)
    exact = hidden.double() @ weight.double().T
    precise = head.precise_logits(hidden)
    assert precise.dtype == head.logits(hidden).dtype == F32
    assert (precise - exact).abs().max() < 1e-5
    assert (head.logits(hidden) - exact).abs().max() > 1e-3
