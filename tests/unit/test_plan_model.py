"""The planner's arithmetic by hand: bytes of packets, operations of a pass, how the parts add up, what must hold."""

from __future__ import annotations

import itertools

import pytest

from lowbit_tools.plan_collectives import Link, choice_for, collective_time, ring_time
from lowbit_tools.plan_model import Machine, pass_time, predict, scheme_pass
from lowbit_tools.plan_shapes import ModelShape
from lowbit_tools.plan_tables import FABRICS, MODELS, table_predictions
from megatron_lowbit.comm.policy import Choice, Policy, default_policy
from megatron_lowbit.comm.schemes import parse_scheme

TINY = ModelShape("tiny", hidden=8, layers=3, heads=2, kv_heads=1, head_dim=4, ffn=6, vocab=10, tied=True)
OUTLIER = parse_scheme("int4-outlier")
LLAMA = ModelShape("1B", 2048, 16, 32, 8, 64, 8192, 128256, tied=True)
RATES = (1e11, 1e10, 5e9)


def machine(nbytes_per_s: float, latency_s: float = 1e-4, overlaps: bool = True) -> Machine:
    return Machine(*RATES, Link(nbytes_per_s, latency_s, overlaps))


def test_a_rank_holds_and_computes_its_part() -> None:
    share = TINY.shares(2)[1]
    assert (share.heads, share.kv_heads, share.ffn, share.vocab) == (1, 1, 3, 5)  # the one key-value head is with both
    # query and output 8 x 4 each, key and value 8 x 4 each; gate, up and down 8 x 3 each
    assert share.layer_weights == 4 * 32 + 3 * 24 == 200
    assert share.resident_nbytes == 2 * (3 * 200 + 5 * 8)
    # 3 tokens behind 2 others see 3 + 4 + 5 = 12 tokens; a pair costs 2 x 4 products of one head, 2 operations each;
    # the head: 5 x 8 products for the last token
    assert share.flops(1, 3, 2) == 3 * (2 * 3 * 200 + 4 * 4 * 12) + 2 * 40
    assert share.flops(7, 3, 2) == 7 * share.flops(1, 3, 2)
    # keys and values of 5 tokens: 2 x 4 values each
    assert share.read_nbytes(1, 3, 2) == 2 * (3 * 200 + 40 + 3 * 5 * 8)
    assert share.read_nbytes(7, 3, 2) == 2 * (3 * 200 + 40 + 7 * 3 * 5 * 8)


def test_without_a_gate_and_with_a_head_of_its_own() -> None:
    plain = ModelShape("plain", 8, 3, 2, 1, 4, 6, 10, tied=False, gated=False)
    assert plain.shares(2)[0].layer_weights == 4 * 32 + 2 * 24
    assert plain.shares(2)[0].resident_nbytes == 2 * (3 * (4 * 32 + 2 * 24) + 2 * 5 * 8)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7, 8])
def test_nothing_is_lost_at_any_size(ranks: int) -> None:
    """Heads, features and vocabulary add up; a key-value head is with every rank that has one of its queries."""
    shape = ModelShape("odd", 81, 2, 9, 3, 8, 97, 131)
    shares = shape.shares(ranks)
    assert [sum(getattr(share, name) for share in shares) for name in ("heads", "ffn", "vocab")] == [9, 97, 131]
    # queries 012 345 678 share; 2 ranks cut 01234 5678, 5 ranks 01 23 45 67 8, 7 ranks 01 23 4 5 6 7 8
    held = {1: 3, 2: 2 + 2, 3: 3, 5: 1 + 2 + 1 + 1 + 1, 7: 1 + 2 + 5, 8: 8}
    assert sum(share.kv_heads for share in shares) == held[ranks]


# 126 codes of 4 bits are 63 bytes, padded to 64; two outliers of 2 bytes
ROW, PLAIN = 68, 256


@pytest.mark.parametrize(
    ("collective", "tokens", "ranks", "wire", "sent", "coded", "stages"),
    [
        # owners have 2, 2 and 1 of 5 tokens. Busiest end of a link: 4 rows in either stage. An owner of 2 sends 3 rows
        # to reduce and 2 x 2 to gather. Coded: 5 x (256 in, 68 out); 2 x 3 rows in, 2 out; 5 x (68 in, 512 in and out)
        ("two-stage", 5, 3, 4 * 2 * ROW, 7 * ROW, 5 * (PLAIN + ROW) + 8 * ROW + 5 * (ROW + 1024), 2),
        # one owner: it receives from 2 others and sends to them
        ("two-stage", 1, 3, 2 * 2 * ROW, 2 * ROW, PLAIN + ROW + 4 * ROW + ROW + 1024, 2),
        # everybody sends all to both others, decodes 3 packets and adds
        ("one-stage", 5, 3, 10 * ROW, 10 * ROW, 5 * (PLAIN + ROW + 3 * ROW + 512 + 3 * 512), 1),
        ("exact", 5, 3, 10 * PLAIN, 10 * PLAIN, 5 * (PLAIN + PLAIN + 3 * PLAIN + 512 + 3 * 512), 1),
        ("two-stage", 4, 2, 2 * 2 * ROW, 4 * ROW, 4 * (PLAIN + ROW) + 6 * ROW + 4 * (ROW + 1024), 2),
        ("two-stage", 7, 7, 6 * 2 * ROW, 12 * ROW, 7 * (PLAIN + ROW) + 8 * ROW + 7 * (ROW + 1024), 2),
    ],
)
def test_an_all_reduce_by_hand(
    collective: str, tokens: int, ranks: int, wire: int, sent: int, coded: int, stages: int
) -> None:
    found = collective_time(OUTLIER, Choice(collective), tokens, 128, ranks, Link(1000.0, 0.5, False), 10_000.0)
    assert found.wire_s == pytest.approx(wire / 1000) and found.sent_nbytes == sent
    assert found.codec_s == pytest.approx(coded / 10_000) and found.latency_s == stages * 0.5
    assert found.seconds == pytest.approx(stages * 0.5 + wire / 1000 + coded / 10_000)  # one piece: nothing overlaps


def test_pieces_overlap_coding_with_sending() -> None:
    cut = Choice("two-stage", 100)  # 12 rows of 68 bytes: 8 pieces, but at least 3 tokens each
    whole = collective_time(OUTLIER, cut, 12, 128, 3, Link(1000.0, 0.5, False), 10_000.0)
    pieces = collective_time(OUTLIER, cut, 12, 128, 3, Link(1000.0, 0.5, True), 10_000.0)
    assert whole.seconds == 1.0 + whole.wire_s + whole.codec_s
    longer, shorter = max(whole.wire_s, whole.codec_s), min(whole.wire_s, whole.codec_s)
    assert pieces.seconds == pytest.approx(1.0 + longer + shorter / 4)


def test_torchs_ring_by_hand() -> None:
    found = ring_time(6, 128, 3, Link(1000.0, 0.5))
    assert found.sent_nbytes == 4 * 6 * PLAIN // 3 and found.seconds == 4 * 0.5 + 2048 / 1000


def test_the_parts_of_a_pass_add_up() -> None:
    slow = Machine(1000.0, 10_000.0, 1e4, Link(1000.0, 0.25, False))
    all_reduce = collective_time(OUTLIER, Choice("two-stage"), 3, 8, 2, slow.link, 1e4)
    found = pass_time(TINY, 2, slow, all_reduce, 1, 3, 2)
    share = TINY.shares(2)[0]
    assert found.compute_s == share.flops(1, 3, 2) / 1000 > share.read_nbytes(1, 3, 2) / 10_000
    assert found.communication_s == 6 * all_reduce.seconds  # two sync points a layer
    # half of 3 rows of 8 values of 2 bytes, a candidate of 8 bytes, and a latency for each of the two
    assert found.elsewhere_s == pytest.approx(0.5 + (24 + 8) / 1000)
    assert found.seconds == found.compute_s + found.communication_s + found.elsewhere_s
    reading = Machine(1e9, 1000.0, 1e4, slow.link)
    assert pass_time(TINY, 2, reading, all_reduce, 1, 3, 2).compute_s == share.read_nbytes(1, 3, 2) / 1000


def test_the_policy_chooses_at_16_bits_and_below() -> None:
    policy = Policy(((16 * 128, Choice("exact")), (1 << 62, Choice("two-stage"))))
    shape = ModelShape("wide", 128, 1, 2, 2, 64, 64, 64)
    found = predict(shape, 2, machine(1e6), OUTLIER, policy, prompt_tokens=20)
    assert [part.all_reduce.collective for part in (found.first_16, found.first)] == ["two-stage"] * 2
    assert [part.all_reduce.collective for part in (found.step_16, found.step)] == ["exact"] * 2
    assert found.step.all_reduce.sent_nbytes == found.step_16.all_reduce.sent_nbytes == PLAIN
    assert found.step.all_reduce.codec_s > 0 == found.step_16.all_reduce.codec_s
    assert choice_for(OUTLIER, None, 1, 128).collective == "two-stage"  # no policy: the scheme's own
    assert choice_for(parse_scheme("int4-outlier:one-stage"), policy, 99, 128).collective == "one-stage"


LINKS = [1e12, 32e9, 12.5e9, 1.25e9, 125e6, 12.5e6, 1e5]


@pytest.mark.parametrize("ranks", [2, 3, 5, 7, 8])
@pytest.mark.parametrize("latency_s", [0.0, 1e-4])
@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("scheme", ["int4-outlier", "int4-outlier:one-stage", "int8-group"])
def test_slower_links_gain_more_and_never_more_than_the_bits(
    ranks: int, latency_s: float, overlaps: bool, scheme: str
) -> None:
    wire = parse_scheme(scheme)
    bound = 2 * LLAMA.hidden / wire.reduce_stage.packet_layout(LLAMA.hidden).row_nbytes
    for policy in (None, default_policy(ranks)):
        found = [predict(LLAMA, ranks, machine(rate, latency_s, overlaps), wire, policy, 512) for rate in LINKS]
        for gains in ([one.first_gain for one in found], [one.step_gain for one in found]):
            assert all(after >= before - 1e-12 for before, after in itertools.pairwise(gains))
            assert max(gains) <= bound
        assert found[-1].first_gain > 0.9 * bound  # there it is all communication
        assert [one.first.seconds for one in found] == sorted(one.first.seconds for one in found)


def test_more_latency_gains_less() -> None:
    gains = [predict(LLAMA, 4, machine(1e9, latency), OUTLIER, None, 512).first_gain for latency in (0, 1e-4, 1e-2)]
    assert gains == sorted(gains, reverse=True) and gains[0] > gains[2] > 1


def test_one_rank_sends_nothing_and_gains_nothing() -> None:
    found = predict(LLAMA, 1, machine(1e6), OUTLIER, None, 512)
    assert found.first_gain == found.step_gain == 1.0
    assert found.first.communication_s == found.first.elsewhere_s == 0.0
    assert found.first.seconds == LLAMA.shares(1)[0].flops(1, 512, 0) / RATES[0]


def test_a_batch_is_a_longer_message() -> None:
    found = predict(LLAMA, 3, machine(1e9), OUTLIER, None, 64, batch=4)
    assert found.first.all_reduce == predict(LLAMA, 3, machine(1e9), OUTLIER, None, 256).first.all_reduce
    step = scheme_pass(LLAMA, 3, machine(1e9), OUTLIER, None, 4, 1, 64)
    assert found.step == step and step.all_reduce.sent_nbytes > 0


@pytest.mark.parametrize(("ranks", "prompt", "batch"), [(0, 1, 1), (2, 0, 1), (2, 1, 0), (-1, 1, 1)])
def test_counts_below_one_are_refused(ranks: int, prompt: int, batch: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        predict(LLAMA, ranks, machine(1e9), OUTLIER, None, prompt, batch)


@pytest.mark.parametrize(
    "rates", [(0, 1, 1, 1, 0), (1, 0, 1, 1, 0), (1, 1, 0, 1, 0), (1, 1, 1, 0, 0), (1, 1, 1, 1, -1)]
)
def test_rates_of_zero_are_refused(rates: tuple[float, ...]) -> None:
    flops, memory, codec, link, latency = rates
    with pytest.raises(ValueError, match="above 0"):
        Machine(flops, memory, codec, Link(link, latency))


def test_ranks_that_share_a_processor_share_its_rates_and_not_the_link() -> None:
    shared = machine(1e9).shared_by(2.5)
    assert (shared.flops, shared.memory_nbytes_per_s, shared.codec_nbytes_per_s) == tuple(rate / 2.5 for rate in RATES)
    assert shared.link == machine(1e9).link


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Llama-2-13B", 13.015), ("Gemma-2-27B", 27.226), ("Llama-2-70B", 68.975), ("Llama-3.1-405B", 405.849)],
)
def test_the_known_models_have_their_published_sizes(name: str, billions: float) -> None:
    """Total parameters as published, norms apart (they are below a thousandth)."""
    (model,) = (model for model in MODELS if model.name == name)
    assert model.shares(1)[0].resident_nbytes / 2e9 == pytest.approx(billions, rel=1e-3)


def test_the_table_covers_all_and_its_rows_say_that_they_are_modelled() -> None:
    found = table_predictions(OUTLIER, [512, 2048], 1)
    assert len(found) == len(MODELS) * len(FABRICS) * 2
    for _, prediction in found:
        row = prediction.row()
        assert row["modelled"] is True and row["tp"] == 8 and row["first_gain"] > 1
        assert row["first_16_all_reduce_sent_nbytes"] > row["first_all_reduce_sent_nbytes"] > 0
        assert not any(isinstance(value, dict) for value in row.values())
