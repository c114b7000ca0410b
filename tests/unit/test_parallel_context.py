"""ParallelContext and sharding rules without other processes: single, virtual, refused, and how things are dealt."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lowbit.parallel import ParallelContext, RankError, TrafficCounter
from megatron_lowbit.sharding import REPLICATED, ShardRule, TensorSource, cut_evenly


def test_a_single_process_is_rank_0_of_1():
    context = ParallelContext.single()
    assert (context.rank, context.size, context.virtual, context.is_first) == (0, 1, False, True)
    assert context.shard == (0, 1) and list(context.local_ranks) == [0]
    assert context.device == torch.device("cpu")


def test_virtual_ranks_share_one_copy_of_the_weights():
    context = ParallelContext.virtual_ranks(5)
    assert (context.rank, context.size, context.virtual) == (0, 5, True)
    assert context.shard == (0, 1) and list(context.local_ranks) == [0, 1, 2, 3, 4]
    assert not ParallelContext.virtual_ranks(1).virtual, "one virtual rank is one rank"


def test_a_process_alone_agrees_with_itself():
    for context in (ParallelContext.single(), ParallelContext.virtual_ranks(3)):
        assert context.all_gather_json({"a": 1}) == [{"a": 1}]
        assert context.broadcast_json("text") == "text"
        assert context.all_gather(torch.ones(2), "test").shape == (1, 2)
        context.agree(None)
        context.agree_same(1, "the setting")
        context.barrier()
        context.close()
        assert context.traffic.total_nbytes() == 0
        with pytest.raises(RankError, match=r"^no file$"):
            context.agree("no file")


def test_work_of_a_single_process_raises_its_own_error():
    context = ParallelContext.single()
    assert context.together(lambda: 5) == 5

    def missing() -> None:
        raise FileNotFoundError("no file")

    with pytest.raises(FileNotFoundError, match="no file"):
        context.together(missing)


def test_contexts_are_frozen_and_count_apart():
    first, second = ParallelContext.single(), ParallelContext.single()
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.rank = 1  # type: ignore[misc]
    first.traffic.add("reduce", 10, 1)
    assert second.traffic.total_nbytes() == 0
    assert first == second, "traffic is no part of what a context is"


def test_traffic_by_purpose():
    traffic = TrafficCounter()
    traffic.add("reduce", 10, 1)
    traffic.add("gather", 5, 2)
    traffic.add("reduce", 1, 3)
    assert traffic.sent_nbytes == {"reduce": 11, "gather": 5} and traffic.messages == {"reduce": 4, "gather": 2}
    assert traffic.total_nbytes() == 16
    traffic.reset()
    assert traffic.sent_nbytes == {} and traffic.messages == {}


@pytest.mark.parametrize(("rank", "size"), [(3, 3), (-1, 2), (0, 0), (1, 1)])
def test_ranks_outside_the_group_are_refused(rank, size):
    with pytest.raises(ValueError, match=f"rank {rank} of {size}"):
        ParallelContext(rank, size, virtual=True)


def test_several_ranks_need_a_group():
    with pytest.raises(ValueError, match=r"2 tensor-parallel ranks need a process group, or virtual=True"):
        ParallelContext(0, 2)


def test_an_environment_without_torchrun_is_a_single_rank(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    context = ParallelContext.from_environment("cpu")
    assert (context.rank, context.size, context.group) == (0, 1, None)


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1000")
    monkeypatch.setenv("LOCAL_RANK", "999")
    monkeypatch.setenv("RANK", "999")
    with pytest.raises(ValueError, match=r"local rank 999 needs its own GPU, \d+ found; .*--device cpu"):
        ParallelContext.from_environment("cuda")


# ---- dealing --------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(count=st.integers(0, 200), size=st.integers(1, 40))
def test_parts_are_contiguous_and_differ_by_one_at_most(count, size):
    parts = cut_evenly(count, size)
    assert len(parts) == size and parts[0][0] == 0 and parts[-1][1] == count
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(parts))
    widths = [stop - start for start, stop in parts]
    assert widths == sorted(widths, reverse=True) and widths[0] - widths[-1] <= 1


def test_parts_by_hand():
    assert cut_evenly(7, 3) == [(0, 3), (3, 5), (5, 7)]
    assert cut_evenly(2, 4) == [(0, 1), (1, 2), (2, 2), (2, 2)]
    assert cut_evenly(0, 2) == [(0, 0), (0, 0)]


@settings(deadline=None, derandomize=True)
@given(
    kv_heads=st.integers(1, 6), per_kv=st.integers(1, 5), width=st.integers(1, 8), size=st.integers(1, 33)
)  # fmt: skip
def test_every_rank_holds_the_key_value_heads_of_its_query_heads(kv_heads, per_kv, width, size):
    heads = kv_heads * per_kv
    query = ShardRule(dim=0, units=heads, block=width)
    key = ShardRule(dim=0, units=heads, units_per_block=per_kv, block=width)
    assert query.extent() == heads * width and key.extent() == kv_heads * width
    for rank in range(size):
        start, stop = query.span(rank, size)
        needed = {head // per_kv for head in range(start // width, stop // width)}
        first, last = key.span(rank, size)
        assert set(range(first // width, last // width)) == needed, "these heads and no others"
        assert first % width == last % width == 0


def test_shapes_of_shards():
    source = TensorSource("w", (10, 4), ShardRule(dim=0, units=10))
    assert [source.shard_shape(rank, 4) for rank in range(4)] == [(3, 4), (3, 4), (2, 4), (2, 4)]
    assert TensorSource("n", (10, 4), REPLICATED).shard_shape(3, 4) == (10, 4)
    with pytest.raises(AssertionError):
        TensorSource("w", (9, 4), ShardRule(dim=0, units=10))
