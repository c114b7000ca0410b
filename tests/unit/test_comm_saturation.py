"""Saturated values are those the encoder really clamps: counted beside it, compared with codes it did not have."""

from __future__ import annotations

import pytest
import torch
from helpers.messages import random_values

from lowbit_kernels import get_backend
from megatron_lowbit.comm.all_reduce import build_all_reduce
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.constants import SyncPointConstants
from megatron_lowbit.comm.saturation import SaturationCounter
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.comm.wire_format import WireFormat
from megatron_lowbit.parallel import ParallelContext


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outliers", [False, True])
def test_counts_what_the_encoder_clamps(bits, outliers):
    hidden, largest = 128, 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(bits)
    outlier_index = torch.tensor([5, 100]) if outliers else None
    is_body = torch.ones(hidden, dtype=torch.bool)
    if outlier_index is not None:
        is_body[outlier_index] = False
    scale_RD = torch.rand(2, int(is_body.sum()), generator=generator).bfloat16().float() / largest + 2.0**-10
    scale_RD = scale_RD.bfloat16().float()

    def codec(saturation: SaturationCounter | None) -> Codec:
        return Codec(
            WireFormat(bits, outlier_divisor=64 if outliers else 0), hidden, get_backend("torch"),
            is_body.nonzero().flatten() if outliers else None, outlier_index, scale_RD, saturation,
        )  # fmt: skip

    counter = SaturationCounter()
    counting, plain = codec(counter), codec(None)
    clamped = lost = 0
    for sender in (0, 1):
        x = random_values((50, hidden), generator, 1.0, 0.05)
        x[0, 0] = (largest + 0.5) * scale_RD[sender, 0]  # a tie, which rounds to the even code beyond the range
        x[1, 0] = torch.nextafter(x[0, 0], torch.tensor(0.0))
        packet_TB = counting.encode(x, sender=sender)
        codes = torch.round(x[:, is_body].double() / scale_RD[sender].double())
        clamped += int((codes.abs() > largest)[x[:, is_body].isfinite()].sum())
        lost += int((~x.isfinite()).sum())
        assert torch.equal(packet_TB, plain.encode(x, sender=sender)), "counting changes nothing"
    assert counter.values == 2 * 50 * hidden
    assert counter.saturated == clamped > 100
    assert counter.non_finite == lost > 0


@pytest.mark.parametrize("wire", [WireFormat(16), WireFormat(32), WireFormat(4, group_size=64)])
def test_formats_whose_scales_follow_the_values_never_saturate(wire):
    counter = SaturationCounter()
    codec = Codec(wire, 8, get_backend("torch"), saturation=counter)
    codec.encode(torch.tensor([[1e30, -1e30, 0, 1, 2, 3, float("nan"), float("inf")]]), sender=0)
    assert (counter.values, counter.saturated, counter.non_finite) == (8, 0, 2)


def test_counts_start_anew_after_a_reset():
    counter = SaturationCounter()
    counter.count(torch.tensor([[9.0, float("nan")]]), torch.tensor([7.5, 7.5]))
    assert (counter.values, counter.saturated, counter.non_finite) == (2, 1, 1)
    counter.reset()
    assert (counter.values, counter.saturated, counter.non_finite) == (0, 0, 0)
    counter.count(torch.ones(0, 2), torch.tensor([7.5, 7.5]))
    assert (counter.values, counter.saturated, counter.non_finite) == (0, 0, 0)


def test_sums_are_counted_apart_where_asked():
    log = {"apart": SaturationCounter(gather=SaturationCounter()), "together": SaturationCounter()}
    for counter in log.values():
        collective = build_all_reduce(
            ParallelContext.virtual_ranks(3), parse_scheme("int8"), 8,
            SyncPointConstants(reduce_scale_RD=torch.ones(3, 8), gather_scale_1D=torch.full((1, 8), 2.0)), "torch",
            saturation=counter,
        )  # fmt: skip
        collective(torch.full((3, 5, 8), 100.0))  # each fits in 127 steps, their sum not in 254
    apart, together = log["apart"], log["together"]
    assert apart.gather is not None and (apart.values, apart.saturated) == (3 * 5 * 8, 0)
    assert (apart.gather.values, apart.gather.saturated) == (5 * 8, 5 * 8)
    assert (together.values, together.saturated) == (4 * 5 * 8, 5 * 8)
    apart.reset()
    assert (apart.values, apart.gather.values, apart.gather.saturated) == (0, 0, 0)
