"""Codec latency: each step of one message on one rank, beside copying the bf16 tensor and the fp32 sum."""

import pytest
import torch

from lowbit_kernels import get_backend
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.schemes import parse_scheme

from .conftest import constants_of

RANKS = 4
FORMATS = ["int4-outlier", "int4-g64", "int8-g128", "int3-g64", "fp8-g128", "mxfp4", "nvfp4", "bf16"]


class Message:
    """Values, their packets and everything that the steps write, allocated once: what a step costs is its own."""

    def __init__(self, name, tokens, hidden):
        scheme = parse_scheme(name)
        constants = constants_of(scheme, hidden, RANKS)
        index = (constants.body_index, constants.outlier_index)
        static = ((constants.reduce_scale_RD, constants.reduce_minimum_RD),)
        static += ((constants.gather_scale_1D, constants.gather_minimum_1D),)
        self.reduce, self.gather = (
            Codec(stage, hidden, get_backend("auto"), *index, scale_RD, minimum_RD=minimum_RD)
            for stage, (scale_RD, minimum_RD) in zip((scheme.reduce_stage, scheme.gather_stage), static, strict=True)
        )
        generator = torch.Generator().manual_seed(tokens)
        self.values_TH = torch.randn(tokens, hidden, generator=generator).bfloat16()
        self.packets = [self.reduce.encode(self.values_TH, sender=rank) for rank in range(RANKS)]
        self.sum_TH = self.reduce.decode_sum(self.packets)
        self.packet_TB = self.gather.encode(self.sum_TH, sender=0)


@pytest.fixture(params=FORMATS)
def message(request, tokens, hidden):
    return Message(request.param, tokens, hidden)


def loops(tokens):
    """Calls in a round: a few microseconds each would drown in the clock."""
    return max(1, 2048 // max(tokens, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_copy(latency, tokens, hidden, dtype):
    source = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    target = torch.empty_like(source)
    latency(lambda: target.copy_(source), loops(tokens))


def test_encode(latency, tokens, message):
    latency(lambda: message.reduce.encode(message.values_TH, 0, message.packets[0]), loops(tokens))


def test_decode(latency, tokens, message):
    latency(lambda: message.gather.decode(message.packet_TB, 0, message.sum_TH), loops(tokens))


def test_decode_add(latency, tokens, message):
    latency(lambda: message.gather.decode(message.packet_TB, 0, message.sum_TH, add=True), loops(tokens))


def test_decode_sum(latency, tokens, message):
    latency(lambda: message.reduce.decode_sum(message.packets, message.sum_TH), loops(tokens))


def test_requantize(latency, tokens, message):
    latency(lambda: message.reduce.requantize(message.packets, message.gather, message.packet_TB), loops(tokens))
