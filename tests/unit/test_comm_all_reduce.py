"""What must hold for every collective, shown on virtual ranks: order, independence of tokens, bias, traffic."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.messages import ALL_SCHEMES, draw_message, same_bits

from lowbit_kernels import get_backend
from megatron_lowbit.comm import reference
from megatron_lowbit.comm.all_reduce import SingleRankAllReduce, build_all_reduce
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.constants import NO_CONSTANTS, SCALE_FLOOR, bf16_scale
from megatron_lowbit.comm.one_stage import OneStageAllReduce
from megatron_lowbit.comm.saturation import SaturationCounter
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.comm.symmetric import SymmetricAllReduce, SymmetricUpToSize, reserve
from megatron_lowbit.comm.sync_point import SyncPoint
from megatron_lowbit.comm.two_stage import TwoStageAllReduce
from megatron_lowbit.comm.virtual import VirtualAllReduce
from megatron_lowbit.comm.wire_format import WireFormat
from megatron_lowbit.parallel import ParallelContext


def virtual_of(message, ranks):
    context = ParallelContext.virtual_ranks(ranks)
    hidden = message.partials[0].shape[1]
    return context, build_all_reduce(context, message.scheme, hidden, message.constants)


@pytest.mark.parametrize("name", ALL_SCHEMES)
def test_a_token_does_not_depend_on_its_batch_mates(name):
    """Whole message, halves and single tokens give the same bits: numbers never depend on slicing or owners."""
    message = draw_message(8, 4, name, tokens=7, hidden=130)
    _, all_reduce = virtual_of(message, 4)
    stacked = torch.stack(message.partials)
    whole = all_reduce(stacked)
    assert same_bits(torch.cat((all_reduce(stacked[:, :3]), all_reduce(stacked[:, 3:]))), whole)
    assert same_bits(torch.cat([all_reduce(stacked[:, token : token + 1]) for token in range(7)]), whole)


def test_exact_adds_in_rank_order():
    """FP32 addition is not associative: 1e8 + 1 - 1e8 is 0 in this order and 1 in another."""
    partials = torch.tensor([[[1e8]], [[1.0]], [[-1e8]]])
    for name in ("exact", "exact:one-stage"):
        all_reduce = build_all_reduce(ParallelContext.virtual_ranks(3), parse_scheme(name), 1, NO_CONSTANTS)
        assert all_reduce(partials).item() == 0.0
        assert all_reduce(partials[[0, 2, 1]]).item() == 1.0


def test_each_sender_is_decoded_with_its_own_scales():
    message = draw_message(3, 3, "int4:one-stage", tokens=2, hidden=8)
    _, all_reduce = virtual_of(message, 3)
    scales = message.constants.reduce_scale_RD
    assert scales is not None
    values = torch.zeros(3, 2, 8)
    values[1] = 3 * scales[1]  # three steps of rank 1
    assert same_bits(all_reduce(values), values[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ALL_SCHEMES)
def test_one_bad_value_surfaces_in_its_place(name, bad):
    """In its place or group, never elsewhere, and never as a plausible number."""
    message = draw_message(24, 3, name, tokens=4, hidden=200)
    _, all_reduce = virtual_of(message, 3)
    partials = torch.randn(3, 4, 200, generator=torch.Generator().manual_seed(0))
    partials[1, 2, 150] = bad
    full_TH = all_reduce(partials)
    assert not full_TH[2, 150].isfinite()
    lost = (~full_TH.isfinite()).nonzero().tolist()
    group = message.scheme.reduce_stage.group_size
    if group:
        assert all(token == 2 and feature // group == 150 // group for token, feature in lost)
    else:
        assert lost == [[2, 150]]


def test_int4_error_is_within_half_a_step_a_rank():
    """The bound that analysis gives, and nearly reached: a scale that is dropped or doubled would leave it."""
    generator = torch.Generator().manual_seed(5)
    ranks, hidden = 4, 256
    partials = torch.randn(ranks, 200, hidden, generator=generator)
    scales = (partials.abs().amax(dim=1) / 6.9).bfloat16().float()
    codec = Codec(WireFormat(4), hidden, get_backend("torch"), None, None, scales)
    packets = [codec.encode(partials[rank], sender=rank) for rank in range(ranks)]
    error = (codec.decode_sum(packets) - partials.double().sum(dim=0)).abs()
    # each rank errs by at most half of its step; the FP32 sum itself by 3 roundings of numbers below 32
    bound = scales.double().sum(dim=0) / 2 + 3 * 32 * 2.0**-24
    assert (error <= bound).all()
    assert error.mean() > 0.2 * bound.mean(), "uniform errors of 4 ranks average about 0.23 of their bound"


def test_one_rank_is_not_touched_by_any_scheme():
    partial = draw_message(1, 1, "int4", tokens=3, hidden=5).partials[0]
    all_reduce = build_all_reduce(ParallelContext.single(), parse_scheme("int4"), 5, NO_CONSTANTS)
    assert isinstance(all_reduce, SingleRankAllReduce)
    assert torch.equal(all_reduce(partial.unsqueeze(0)), partial.float())


def test_the_scheme_decides_the_collective():
    context = ParallelContext(rank=1, size=3, group=object())  # type: ignore[arg-type]  # none is needed to choose
    assert isinstance(build_all_reduce(context, parse_scheme("bf16"), 8, NO_CONSTANTS), TwoStageAllReduce)
    assert isinstance(build_all_reduce(context, parse_scheme("bf16:one-stage"), 8, NO_CONSTANTS), OneStageAllReduce)
    virtual = build_all_reduce(ParallelContext.virtual_ranks(3), parse_scheme("bf16"), 8, NO_CONSTANTS)
    assert isinstance(virtual, VirtualAllReduce) and virtual.stages == 2


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="codec backend 'fast' is unknown"):
        build_all_reduce(ParallelContext.virtual_ranks(2), parse_scheme("bf16"), 8, NO_CONSTANTS, "fast")


def test_virtual_traffic_adds_up_over_calls():
    context = ParallelContext.virtual_ranks(3)
    all_reduce = build_all_reduce(context, parse_scheme("bf16"), 10, NO_CONSTANTS)
    for tokens in (4, 2, 0):
        all_reduce(torch.ones(3, tokens, 10))
    # 6 tokens of 20 bytes: each leaves 2 ranks for its owner, and its owner twice; owners: 3, then 2, then none
    assert context.traffic.sent_nbytes == {"reduce": 6 * 2 * 20, "gather": 6 * 2 * 20}
    assert context.traffic.messages == {"reduce": 5 * 2, "gather": 5 * 2}
    assert context.traffic.total_nbytes() == 480
    context.traffic.reset()
    assert context.traffic.total_nbytes() == 0


def test_bias_joins_once_behind_the_wire():
    """Not once a rank, and not through the packet: an INT4 step would swallow it."""

    def all_reduce(partial_LTH, add_to_TH):
        return add_to_TH.add_(partial_LTH.sum(dim=0))

    point = SyncPoint("layers.0.mlp.down_proj", all_reduce)
    partials, residual, bias = torch.ones(4, 2, 3), torch.full((2, 3), 10.0), torch.tensor([0.25, 0.0, -1.0])
    assert point.add(partials, residual.clone(), bias, residual, None).tolist() == [[14.25, 14.0, 13.0]] * 2
    assert point.add(partials, residual, None, residual, None) is residual
    assert residual.tolist() == [[14.0] * 3] * 2


def test_reference_quantise_is_a_packet_there_and_back():
    message = draw_message(5, 1, "int8-group", tokens=3, hidden=70)
    wire, x = message.scheme.reduce_stage, message.partials[0]
    codec = Codec(wire, 70, get_backend("torch"))
    got = reference.quantise(x, wire, NO_CONSTANTS, None)
    assert same_bits(got, codec.decode(codec.encode(x, sender=0), sender=0))


def test_codec_demands_scales_exactly_where_they_are_static():
    for wire, scales in ((WireFormat(4), None), (WireFormat(4, group_size=8), torch.ones(1, 8))):
        with pytest.raises(AssertionError):
            Codec(wire, 8, get_backend("torch"), None, None, scales)


def test_codec_writes_into_the_buffer_it_is_given():
    codec = Codec(WireFormat(16), 4, get_backend("torch"))
    buffer = torch.full((5, 8), 0xAA, dtype=torch.uint8)
    x = torch.randn(2, 4)
    got = codec.encode(x, sender=0, packet_TB=buffer[1:3])
    assert got.data_ptr() == buffer[1:3].data_ptr()
    assert torch.equal(buffer[1:3], codec.encode(x, sender=0))
    assert (buffer[[0, 3, 4]] == 0xAA).all()


def test_static_scales():
    # 7/7 = 1; 1/7 = 0.142857 = 1.142857 * 2^-3, 0.142857 * 128 = 18.29 -> 18: 1.140625 * 2^-3 in bf16
    scale = bf16_scale(torch.tensor([7.0, 1.0, 0.0, 1e-38, 3.0e38]))
    assert scale[:3].tolist() == [1.0, 1.140625 * 2**-3, SCALE_FLOOR]
    assert scale[3] == SCALE_FLOOR and scale[4].isfinite()
    assert torch.equal(scale, scale.bfloat16().float())
    assert (1 / scale).isfinite().all()


def test_a_dead_feature_encodes_to_zero():
    """A feature that calibration never saw above 0 must not turn into NaN, whatever comes later."""
    codec = Codec(WireFormat(4), 3, get_backend("torch"), None, None, bf16_scale(torch.zeros(1, 3)))
    got = codec.decode(codec.encode(torch.tensor([[0.0, -0.0, 5.0]]), sender=0), sender=0)
    assert got.isfinite().all() and got.abs().max() <= 7 * SCALE_FLOOR


def test_symmetric_memory_takes_what_fits(monkeypatch):
    """Where ranks share memory, messages up to the reserved size go through it and longer ones as messages."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
    context = SimpleNamespace(
        size=2, rank=0, peers=[1], virtual=False, device=torch.device("cpu"), transport=SimpleNamespace(overlaps=False)
    )
    buffers = SimpleNamespace(endpoint=SimpleNamespace(most_tokens=lambda row_nbytes: 4))

    def build(scheme, saturation=None):
        arguments = (context, parse_scheme(scheme), 64, NO_CONSTANTS)
        return build_all_reduce(*arguments, saturation=saturation, symmetric=buffers)

    all_reduce = build("int4-g64")
    assert isinstance(all_reduce, SymmetricUpToSize)
    for kind in (SymmetricAllReduce, TwoStageAllReduce):
        monkeypatch.setattr(kind, "__call__", lambda self, partial, add_to=None: type(self))
    assert [all_reduce(torch.zeros(1, tokens, 64)) for tokens in (0, 4, 5)] == [
        SymmetricAllReduce, SymmetricAllReduce, TwoStageAllReduce,
    ]  # fmt: skip
    # what must be seen in between, has no second stage, or takes other kernels, stays with messages
    assert isinstance(build("int4-g64", SaturationCounter()), TwoStageAllReduce)
    for scheme in ("int4-g64-rotated", "tc3-g64", "int4-g64+tc4-g64-e4m3", "tc2-g16+bf16"):
        assert isinstance(build(scheme), TwoStageAllReduce), scheme
    assert isinstance(build("int4-g64:one-stage"), OneStageAllReduce)


@pytest.mark.parametrize("name", ["tc4-g64", "int8-group+tc3-g40"])
def test_symmetric_memory_refuses_a_trellis(name):
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
    with pytest.raises(ValueError, match="along a trellis; symmetric memory serves formats other than tc2, tc3"):
        SymmetricAllReduce(ParallelContext.virtual_ranks(2), parse_scheme(name), 128, NO_CONSTANTS, None)


@pytest.mark.parametrize("ranks", [1, 4])
def test_no_memory_is_reserved_on_cpus(ranks):
    context = ParallelContext.single() if ranks == 1 else ParallelContext.virtual_ranks(ranks)
    assert reserve(context, parse_scheme("int4-g64"), 64) is None


def test_no_memory_is_reserved_for_a_trellis(caplog):
    context = SimpleNamespace(device=torch.device("cuda"), size=2, virtual=False)
    with caplog.at_level("INFO"):
        assert reserve(context, parse_scheme("tc4-g64"), 64) is None
    assert "tc4-g64 codes values along a trellis" in caplog.text
