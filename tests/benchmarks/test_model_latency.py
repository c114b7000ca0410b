"""Model latency: one prefill and one decode step of a small random model under 16-bit and low-bit collectives."""

import pytest

from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.generate import TokenGeneration
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.sampling import SamplingParams

SCHEMES = ["bf16", "int4-outlier"]
ROUNDS = 10


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("length", [128, 512])
def test_prefill(latency, name, length, random_model, ranked_context):
    model = random_model(parse_scheme(name))
    batch = TokenBatch.prompts([[token % 997 for token in range(length)]], ranked_context.device)
    latency(lambda: model(batch), rounds=ROUNDS)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("sequences", [1, 8])
def test_decode_step(latency, name, sequences, random_model):
    model = random_model(parse_scheme(name))
    prompts = [[sequence + 1] * 128 for sequence in range(sequences)]
    generation = TokenGeneration(model, prompts, SamplingParams(max_new_tokens=4 * ROUNDS, ignore_eos=True))
    generation.step()
    latency(generation.step, rounds=ROUNDS)
