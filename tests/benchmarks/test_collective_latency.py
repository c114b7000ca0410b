"""Collective latency: the all-reduce of each scheme, and torch's own where there are several real ranks."""

import pytest
import torch.distributed as dist

from megatron_lowbit.comm.schemes import parse_scheme


@pytest.mark.parametrize("name", ["bf16", "int8-group", "int4-outlier", "int4-outlier:one-stage"])
def test_all_reduce(latency, tokens, name, all_reduce_of, partials):
    all_reduce, partial_LTH = all_reduce_of(parse_scheme(name)), partials(tokens)
    latency(lambda: all_reduce(partial_LTH))


def test_torch_all_reduce(latency, tokens, context, partials):
    if context.size == 1:
        pytest.skip("torch's all-reduce needs several real ranks: run this suite under torchrun")
    (partial_TH,) = partials(tokens)
    buffer = partial_TH.clone()

    def call():
        buffer.copy_(partial_TH)
        dist.all_reduce(buffer, group=context.group)

    latency(call)
