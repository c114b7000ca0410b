"""Whole models at 1 to 8 virtual ranks against transformers, FP32."""

from __future__ import annotations

import pytest
import torch
from helpers.model_cases import logits_of, prompt_of

from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.models.registry import config_from_hf, tensor_sources
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.weights import load_weights

VARIANTS = ["odd", "biased", "sparse"]
# FP32 rounding: 14 products, each a sum of n <= 97 terms, whose order differs between split and whole sums. A sum errs
# by about sqrt(n) * 2^-24 = 6e-7 of its terms' size (some units here), layers pass errors on with a factor of a few:
# about 1e-5 in logits of size 1 to 5. `test_mistakes_are_far_above_the_tolerance` shows that errors are not hidden.
TOLERANCE = 1e-4
HF_CONFIG = dict(
    model_type="llama", hidden_size=64, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8, vocab_size=9
)  # fmt: skip


def hf_logits(tiny_models, variant, prompt) -> torch.Tensor:
    with torch.no_grad():
        return tiny_models.hf(variant)(torch.tensor([prompt])).logits[0]


@pytest.mark.parametrize("tp", range(1, 9))
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_logits_equal_transformers(tiny_models, variant, tp):
    weights = load_weights(tiny_models(variant), ParallelContext.virtual_ranks(tp), torch.float32)
    prompt = prompt_of(
        weights.config.vocab_size, 60
    )  # beyond the 24 positions at which "biased" stretches its rotary embedding
    expected = hf_logits(tiny_models, variant, prompt)
    torch.testing.assert_close(logits_of(weights, prompt), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("scheme", ["exact:one-stage", "bf16", "int8-group"])
def test_every_rank_count_gives_nearly_the_same_quality(tiny_models, scheme):
    """Quantised partial sums move the logits, but not much at 8 bits and above, and the exact ones not at all."""
    prompt = None
    for tp in (2, 3, 8):
        weights = load_weights(tiny_models("odd"), ParallelContext.virtual_ranks(tp), torch.float32)
        prompt = prompt_of(weights.config.vocab_size, 40)
        expected = hf_logits(tiny_models, "odd", prompt)
        error = (logits_of(weights, prompt, scheme) - expected).abs().mean() / expected.abs().mean()
        if scheme == "exact:one-stage":
            assert error < TOLERANCE
        else:
            assert 1e-4 < error < 0.1, "the scheme is either not in use or broken"


def test_mistakes_are_far_above_the_tolerance(tiny_models):
    """What the comparisons above would see if a shard were wrong: at least 100 times the tolerance."""
    model = tiny_models.hf("biased")
    prompt = prompt_of(model.config.vocab_size, 60)
    expected = hf_logits(tiny_models, "biased", prompt)
    prefix = "model.layers.1."
    mistakes = {
        "an output bias counted twice": (prefix + "mlp.down_proj.bias", lambda weight: 2 * weight),
        "an attention bias left out": (prefix + "self_attn.o_proj.bias", torch.zeros_like),
        "key-value heads exchanged": (prefix + "self_attn.k_proj.weight", lambda weight: weight.roll(12, 0)),
        "one head's output lost": (
            prefix + "self_attn.o_proj.weight",
            lambda weight: torch.cat((weight[:, :60], torch.zeros_like(weight[:, 60:])), dim=1),
        ),
        "the last feature of the ffn lost": (
            prefix + "mlp.down_proj.weight",
            lambda weight: torch.cat((weight[:, :-1], torch.zeros_like(weight[:, -1:])), dim=1),
        ),
    }
    for mistake, (name, change) in mistakes.items():
        parameter = model.get_parameter(name)
        original = parameter.data
        parameter.data = change(original)
        moved = (hf_logits(tiny_models, "biased", prompt) - expected).abs().max()
        parameter.data = original
        assert moved > 100 * TOLERANCE, mistake
    shifted = hf_logits(tiny_models, "biased", prompt[1:])
    assert (shifted - expected[1:]).abs().max() > 100 * TOLERANCE, "the first token unseen"


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_model_is_close_to_the_fp32_one(tiny_models, variant):
    """bf16 keeps 8 bits: 2^-9 a rounding, some 20 roundings deep. More than 10 % would be a broken path."""
    weights = load_weights(tiny_models(variant), ParallelContext.virtual_ranks(3), torch.bfloat16)
    prompt = prompt_of(weights.config.vocab_size, 40)
    expected = hf_logits(tiny_models, variant, prompt)
    error = (logits_of(weights, prompt) - expected).abs().mean() / expected.abs().mean()
    assert 1e-3 < error < 0.1


def test_default_dtype_of_a_hugging_face_folder_is_bf16(tiny_models):
    weights = load_weights(tiny_models("sparse"), ParallelContext.single())
    assert weights.dtype == torch.bfloat16
    assert weights.tensors["embed_tokens.weight"].dtype == torch.bfloat16
    # norms and biases after the sum stay FP32: they cost nothing and are rounded once
    assert weights.tensors["norm.weight"].dtype == torch.float32


def test_models_of_several_schemes_share_their_weights(tiny_models):
    weights = load_weights(tiny_models("odd"), ParallelContext.virtual_ranks(2), torch.float32)
    first, second = (weights.build_with_scheme(parse_scheme(name)) for name in ("exact", "bf16"))
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()


def test_every_sync_point_reduces_once_a_forward_pass(tiny_models):
    """Two a layer, under the names calibration files know: a dropped reduction would show here."""
    weights = load_weights(tiny_models("odd"), ParallelContext.virtual_ranks(2), torch.float32)
    calls = []

    def counting(name):
        def all_reduce(partial_LTH, add_to_TH):
            calls.append((name, tuple(partial_LTH.shape)))
            return add_to_TH.add_(partial_LTH.sum(dim=0))

        return all_reduce

    weights.build(counting)(TokenBatch.prompts([[1, 2, 3], [4]], torch.device("cpu")))
    assert calls == [
        (f"layers.{layer}.{path}", (2, 4, 81)) for layer in range(2) for path in ("self_attn.o_proj", "mlp.down_proj")
    ]


def test_config_reads_old_and_new_rotary_keys():
    scaling = dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    )  # fmt: skip
    old = config_from_hf({**HF_CONFIG, "rope_theta": 5e5, "rope_scaling": scaling}, "old")
    new = config_from_hf({**HF_CONFIG, "rope_parameters": {**scaling, "rope_theta": 5e5}}, "new")
    assert old == new
    assert old.rope_theta == 5e5 and old.rope_scaling is not None and old.rope_scaling.original_max_position == 32
    assert (old.head_dim, old.num_kv_heads, old.eos_token_ids) == (16, 4, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported:.*llama"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"sliding_window": 16, "max_position_embeddings": 64}, "sliding_window 16 is shorter"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope type 'dynamic' is not supported"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key-value heads"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"head_dim": 3}, "3 of 3 features"),
    ],
)
def test_config_refuses_what_the_model_cannot_run(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**HF_CONFIG, **change}, "config.json")


@pytest.mark.parametrize("size", range(1, 12))
def test_shards_cover_every_tensor(tiny_models, size):
    """Rows of all ranks together are the whole tensor; only key-value blocks may lie on two ranks."""
    config = load_weights(tiny_models("odd"), ParallelContext.single(), torch.float32).config
    for name, source in tensor_sources(config).items():
        if source.rule.dim is None:
            assert source.shard_shape(0, size) == source.shape
            continue
        held = [position for rank in range(size) for position in range(*source.rule.span(rank, size))]
        assert sorted(set(held)) == list(range(source.shape[source.rule.dim])), name
        if "k_proj" not in name and "v_proj" not in name:
            assert len(held) == len(set(held)), f"{name} overlaps at {size} ranks"
