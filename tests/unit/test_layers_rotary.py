"""Every way to stretch a rotary embedding, against transformers' frequencies and by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_lowbit.config import ModelConfig, RopeScaling
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.layers.rotary import Rotary, attention_factor, inverse_frequencies, rotate
from megatron_lowbit.models.hf_rope import read_rope

CPU = torch.device("cpu")
PLAIN = ModelConfig("llama", 64, 8, 2, 4, 2, 16, 4, 512, 1e-5, 1e4, True)
EIGHT = [1.0 + step / 4 for step in range(8)]

# as in published files: Gemma 3, Llama 3.1, Qwen 2.5, gpt-oss, DeepSeek's two scales, Phi-3
STRETCHED = {
    "linear": dict(rope_type="linear", factor=8.0),
    "llama3": dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=256),
    "yarn, not rounded": dict(
        rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
        original_max_position_embeddings=400,
    ),
    "yarn, ramp cut off below": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    "yarn, ramp cut off above": dict(
        rope_type="yarn", factor=4.0, rope_theta=3.0, original_max_position_embeddings=512
    ),
    "yarn of two scales": dict(
        rope_type="yarn", factor=40.0, mscale=1.0, mscale_all_dim=0.8, original_max_position_embeddings=256
    ),
    "yarn of a given factor": dict(
        rope_type="yarn", factor=4.0, attention_factor=1.5, original_max_position_embeddings=256
    ),
    "longrope": dict(
        rope_type="longrope", short_factor=EIGHT, long_factor=[2 * value for value in EIGHT], factor=4.0,
        original_max_position_embeddings=128,
    ),
    "longrope without a factor": dict(
        rope_type="longrope", short_factor=EIGHT, long_factor=[2 * value for value in EIGHT],
        original_max_position_embeddings=128,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRETCHED)
def test_frequencies_equal_transformers(name):
    parameters = {"rope_theta": 500.0, **STRETCHED[name]}
    theirs = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=512, rope_parameters=dict(parameters)
    )
    rope = read_rope({"rope_parameters": parameters, "max_position_embeddings": 512}, "config.json")
    config = replace(PLAIN, rope_theta=rope.theta, rope_scaling=rope.scaling)
    for long in (False, True):
        expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, CPU, seq_len=512 if long else 8)
        torch.testing.assert_close(inverse_frequencies(config, long=long), expected, rtol=1e-6, atol=0)
        assert attention_factor(rope.scaling) == pytest.approx(factor, rel=1e-12)
    assert not torch.allclose(expected, inverse_frequencies(replace(config, rope_scaling=None)), rtol=1e-3, atol=0)


def test_yarn_by_hand():
    """Of 8 frequencies of theta 10000 and 1000 tokens, those stay that turn more than 32 times."""
    config = replace(PLAIN, rope_scaling=RopeScaling("yarn", 4.0, 1000))
    turns = [16 * math.log(1000 / (times * 2 * math.pi)) / (2 * math.log(1e4)) for times in (32, 1)]
    assert turns == pytest.approx([1.3933, 4.4036], abs=1e-3), "rounded outwards: a ramp from 1 to 5"
    plain = [1e4 ** (-feature / 8) for feature in range(8)]
    kept = [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    expected = [share * value + (1 - share) * value / 4 for share, value in zip(kept, plain, strict=True)]
    assert inverse_frequencies(config).tolist() == pytest.approx(expected, rel=1e-5)
    assert attention_factor(config.rope_scaling) == pytest.approx(0.1 * math.log(4) + 1)


def test_local_frequencies_are_never_stretched():
    config = replace(PLAIN, rope_scaling=RopeScaling("linear", 8.0), rope_local_theta=100.0)
    expected = [100.0 ** (-feature / 8) for feature in range(8)]
    assert inverse_frequencies(config, local=True).tolist() == pytest.approx(expected, rel=1e-5)
    yarn = replace(config, rope_scaling=RopeScaling("yarn", 4.0, 100, attention_factor=2.0))
    batch = TokenBatch(torch.zeros(1, dtype=torch.int64), (1,), (0,))
    assert Rotary(yarn, CPU).tables(batch)[0].unique().item() == 2.0
    assert Rotary(yarn, CPU, local=True).tables(batch)[0].unique().item() == 1.0
    without = replace(config, rope_local_theta=None)
    assert torch.equal(inverse_frequencies(without, local=True), inverse_frequencies(config))


def test_only_leading_features_turn():
    config = replace(PLAIN, rotary_dim=6)
    batch = TokenBatch(torch.zeros(3, dtype=torch.int64), (3,), (5,))
    x_TND = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(1))
    tables = Rotary(config, CPU).tables(batch)
    assert tables[0].shape == (3, 1, 6)
    got = rotate(x_TND, tables)
    assert torch.equal(got[..., 6:], x_TND[..., 6:])
    assert torch.equal(got[..., :6], rotate(x_TND[..., :6].contiguous(), tables))
    assert (got[..., :6] - x_TND[..., :6]).abs().amax(dim=-1).min() > 0.1


def test_sequences_choose_their_frequencies_by_their_own_length():
    """Beside a long one, a short one turns as it would alone; a cache decides for all by what it could hold."""
    scaling = RopeScaling("longrope", 4.0, 10, short_factors=tuple(EIGHT), long_factors=tuple(2 * x for x in EIGHT))
    rotary = Rotary(replace(PLAIN, rope_scaling=scaling), CPU)

    def batch(*lengths: int) -> TokenBatch:
        return TokenBatch.prompts([[0] * length for length in lengths], CPU)

    short, long = rotary.tables(batch(10)), rotary.tables(batch(11))
    for ours, first, second in zip(rotary.tables(batch(10, 11)), short, long, strict=True):
        assert torch.equal(ours, torch.cat((first, second)))
    assert not torch.equal(long[1][:10], short[1])
    for capacity, expected in ((10, short), (11, long)):
        for ours, whole in zip(rotary.tables(batch(10), capacity), expected, strict=True):
            assert torch.equal(ours, whole[:10])


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope type 'dynamic' is not supported; supported: def"),
        (dict(rope_scaling=dict(type="linear")), "rope type 'linear' needs the key 'factor'"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "yarn needs the context length"),
        (dict(rope_scaling=dict(rope_type="longrope", factor=4.0, original_max_position_embeddings=8)), "long_factor"),
        (dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))), "differ by layer type"),
        (dict(rope_scaling=dict(type="linear", factor=-1.0)), "factor is -1.0"),
    ],
)  # fmt: skip
def test_refusals_say_what_is_wrong(hf, message):
    with pytest.raises(ValueError, match=message):
        read_rope(hf, "config.json")
