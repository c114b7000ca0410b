"""Codec latency: encode, decode and decode_sum of one message on one rank, beside copying the bf16 tensor."""

import pytest
import torch

from lowbit_kernels import get_backend
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.schemes import parse_scheme

from .conftest import constants_of

RANKS = 4


@pytest.fixture(params=["int4-outlier", "int4-group", "int8-group", "bf16"])
def codec(request, hidden):
    scheme = parse_scheme(request.param)
    constants = constants_of(scheme, hidden, RANKS)
    return Codec(
        scheme.reduce_stage, hidden, get_backend("auto"), constants.body_index, constants.outlier_index,
        constants.reduce_scale_RD,
    )  # fmt: skip


@pytest.fixture
def values(tokens, hidden):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def loops(tokens):
    """Calls in a round: a few microseconds each would drown in the clock."""
    return max(1, 2048 // max(tokens, 1))


def test_copy(latency, tokens, values):
    target = torch.empty_like(values)
    latency(lambda: target.copy_(values), loops(tokens))


def test_encode(latency, tokens, codec, values):
    packet = codec.encode(values, sender=0)
    latency(lambda: codec.encode(values, 0, packet), loops(tokens))


def test_decode(latency, tokens, codec, values):
    packet = codec.encode(values, sender=0)
    latency(lambda: codec.decode(packet, 0), loops(tokens))


def test_decode_sum(latency, tokens, codec, values):
    packets = [codec.encode(values, sender=rank) for rank in range(RANKS)]
    latency(lambda: codec.decode_sum(packets), loops(tokens))
