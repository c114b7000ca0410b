"""What `bench-model` is made of: weights cut from one random model, a clock at sync points, medians over ranks."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowbit_tools import model_bench
from lowbit_tools.all_reduce_bench import BASELINE
from lowbit_tools.communication_clock import ELSEWHERE, SYNC, CommunicationClock, TimedTransport, time_sync_points
from lowbit_tools.model_bench import ModelRow, Variant, bench_model, own_calibration, random_prompt, variants
from lowbit_tools.random_weights import random_weights
from megatron_lowbit.comm.policy import Choice, Policy
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.layers.sharded import sharded_parameters
from megatron_lowbit.models.decoder import Decoder
from megatron_lowbit.parallel import ParallelContext

CONFIG = ModelConfig("llama", 81, 97, 2, 9, 3, 8, 131, 96, 1e-5, 1e4, False, attention_bias=True)
BF16 = torch.bfloat16


def rank_context(rank: int, size: int) -> Any:
    """Enough of a context to cut weights by."""
    return SimpleNamespace(rank=rank, size=size, shard=(rank, size), virtual=False, device=torch.device("cpu"))


@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_every_rank_draws_its_part_of_one_model(size: int) -> None:
    whole = random_weights(CONFIG, ParallelContext.single(), BF16)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in whole.tensors.values())
    parameters = {
        name: sources for name, _, sources in sharded_parameters(whole.build(lambda name: lambda *tensors: tensors[0]))
    }
    for rank in range(size):
        mine = random_weights(CONFIG, rank_context(rank, size), BF16)
        for name, sources in parameters.items():
            parts = whole.tensors[name].split([source.shape[0] for source in sources])
            cut = [
                part if source.rule.dim is None else part.narrow(source.rule.dim, start, stop - start)
                for part, source in zip(parts, sources, strict=True)
                for start, stop in [(0, 0) if source.rule.dim is None else source.rule.span(rank, size)]
            ]
            assert torch.equal(mine.tensors[name], torch.cat(cut)), (rank, name)


def test_random_weights_differ_where_they_should() -> None:
    weights, again = (random_weights(CONFIG, ParallelContext.single(), BF16, seed) for seed in (0, 0))
    other = random_weights(CONFIG, ParallelContext.single(), BF16, seed=1)
    name = "layers.0.mlp.down_proj.weight"
    assert torch.equal(weights.tensors[name], again.tensors[name])
    assert not torch.equal(weights.tensors[name], other.tensors[name])
    assert not torch.equal(weights.tensors[name], weights.tensors["layers.1.mlp.down_proj.weight"])
    assert weights.tensors[name].float().std() * 97**0.5 == pytest.approx(1, rel=0.05)
    assert len({tuple(row.tolist()) for row in weights.tensors[name]}) == 81  # no row twice
    assert bool((weights.tensors["norm.weight"] == 1).all())


def virtual_variants(schemes: str, policy: Policy | None = None) -> tuple[list[Variant], CommunicationClock]:
    context = ParallelContext.virtual_ranks(3)
    weights = random_weights(CONFIG, context, BF16)
    clock = CommunicationClock(context.device)
    parsed = [parse_scheme(name) for name in schemes.split(",")]
    return variants(weights, parsed, own_calibration(weights), policy, "torch", clock), clock


def test_variants_are_the_schemes_and_the_low_ones_under_a_policy() -> None:
    policy = Policy(((400, Choice("exact")), (1 << 62, Choice("two-stage"))))
    found, _ = virtual_variants("bf16,int4-outlier,int4:one-stage", policy)
    assert [variant.name for variant in found] == [
        BASELINE, "bf16", "int4-outlier", "int4-outlier, policy", "int4:one-stage",
    ]  # fmt: skip
    assert all(variant.sync_points == 2 * CONFIG.num_layers for variant in found)
    assert [found[3].collective(tokens) for tokens in (1, 2, 3)] == ["exact", "exact", "two-stage"]
    assert found[2].collective(1) == ""
    # all of them use the same memory for their weights
    addresses = {variant.model.embed_tokens.weight.data_ptr() for variant in found}
    assert len(addresses) == 1
    assert [variant.name for variant in virtual_variants("bf16,int4-outlier")[0]] == [BASELINE, "bf16", "int4-outlier"]


def test_a_clock_changes_no_bit_and_counts_every_sync_point() -> None:
    (_, timed), clock = virtual_variants("int4-outlier")
    weights = random_weights(CONFIG, timed.model.context, BF16)
    plain = weights.build_with_scheme(parse_scheme("int4-outlier"), own_calibration(weights), "torch")
    batch = TokenBatch.prompts([random_prompt(131, 9)], torch.device("cpu"))
    clock.reset()
    began = time.perf_counter()
    assert torch.equal(timed.model(batch), plain(batch))
    assert clock.calls == 4
    assert 0 < clock.seconds(SYNC) < time.perf_counter() - began
    assert clock.seconds(ELSEWHERE) == 0.0


def test_waiting_inside_a_sync_point_counts_there() -> None:
    clock = CommunicationClock(torch.device("cpu"))
    inner = SimpleNamespace(name="n", overlaps=True, wait=lambda tickets: time.sleep(0.02))
    transport = TimedTransport(inner, clock)  # type: ignore[arg-type]
    began = time.perf_counter()
    transport.wait(None)
    clock.run(SYNC, transport.wait, [1])
    elapsed = time.perf_counter() - began
    assert clock.calls == 1
    # neither counts what the other has
    assert min(clock.seconds(ELSEWHERE), clock.seconds(SYNC)) >= 0.02
    assert clock.seconds(ELSEWHERE) + clock.seconds(SYNC) <= elapsed
    clock.reset()
    assert clock.calls == 0 == clock.seconds(SYNC)


def test_a_failure_leaves_the_clock_usable() -> None:
    clock = CommunicationClock(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        clock.run(SYNC, lambda: 1 / 0)
    assert clock.run(SYNC, lambda: 3) == 3 and clock.calls == 2


def test_the_rank_with_most_work_of_its_own_says_what_communication_took() -> None:
    # rank 0 waits 3 of its 5 seconds for rank 1, which computes longer; round 2 is the other way round
    ranks = [[[[5.0, 3.0, 0.5, 10, 1]]], [[[4.9, 1.0, 0.2, 12, 2]]]]
    found = model_bench._Phase.of(ranks, 0)
    assert found.seconds == [5.0] and found.sync_s == 1.0 and found.elsewhere_s == 0.2
    assert found.sync_share == pytest.approx(1 / 4.9)
    assert (found.sync_nbytes, found.elsewhere_nbytes) == (12, 2)
    slower = model_bench._Phase.of([[[[10.0, 3.0, 0.5, 10, 1]]]], 0)
    assert slower.ratio(found) == (0.5, (0.5, 0.5)) and slower.ratio(None) == (None, None)


def test_one_rank_is_timed_too() -> None:
    context = ParallelContext.single()
    clock = CommunicationClock(context.device)
    found = variants(random_weights(CONFIG, context, BF16), [parse_scheme("bf16")], None, None, "torch", clock)
    said: list[tuple[int, int]] = []
    rows = bench_model(found, [5, 70], 3, 2, clock, lambda done, total: said.append((done, total)))
    assert [(row.prompt_tokens, row.scheme, row.tp, row.rounds) for row in rows] == [
        (5, "one rank", 1, 2), (70, "one rank", 1, 2),
    ]  # fmt: skip
    for row in rows:
        assert isinstance(row, ModelRow)
        assert 0 < row.ttft_low_s <= row.ttft_s <= row.ttft_high_s and row.decode_tokens_per_s == 1 / row.step_s
        assert row.ttft_ratio_to_torch is None and row.ttft_sent_nbytes == 0
    assert said == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_reduction_that_was_dropped_is_noticed() -> None:
    context = ParallelContext.single()
    clock = CommunicationClock(context.device)
    (only,) = variants(random_weights(CONFIG, context, BF16), [], None, None, "torch", clock)
    only.sync_points += 1
    with pytest.raises(AssertionError, match="4 all-reduces in a pass"):
        bench_model([only], [5], 2, 1, clock)


def test_sync_points_are_found_in_every_layer() -> None:
    model = Decoder(ParallelContext.single(), CONFIG, BF16, lambda name: lambda *tensors: tensors[0])  # type: ignore
    assert time_sync_points(model, CommunicationClock(torch.device("cpu"))) == 4
    assert model.layers[1].mlp.down_proj.sync_point.name == "layers.1.mlp.down_proj"
