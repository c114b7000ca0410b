"""Whole mixtures of experts against transformers, FP32, at 1 to 4 virtual ranks and on 2 real ones."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from helpers import model_cases
from helpers.model_cases import logits_of, prompt_of
from helpers.tiny_moe import VARIANTS, TinyMoE, follow_stored_parts, weights_of
from safetensors.torch import load_file

from megatron_lowbit.calibration_run import calibrate
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.models.registry import config_from_hf, stored_parts, tensor_sources
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.weights import load_weights

# FP32 rounding, derived in tests/unit/test_models_virtual_tp.py; `test_mistakes_show` proves that it hides nothing.
# Routing multiplies no error: transformers' and our logits of the router agree to 1e-5, and no two experts of these
# models come closer than that (a test would fail by far more than the tolerance).
TOLERANCE = 1e-4
LENGTH = 48  # several windows, and three times the context that gpt-oss' rotary embedding stretches
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyMoE:
    return TinyMoE(tmp_path_factory.mktemp("moe"))


def config_of(tiny, variant):
    return config_from_hf(tiny.hf(variant).config.to_dict(), variant)


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tp", range(1, 5))
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tiny, variant, tp):
    config = config_of(tiny, variant)
    weights = weights_of(config, tiny.canonical(variant, config), ParallelContext.virtual_ranks(tp))
    prompt = prompt_of(config.vocab_size, LENGTH)
    assert_close(logits_of(weights, prompt), tiny.hf_logits(variant, prompt))


@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_from_its_folder(tiny, variant):
    """The project's reader finds the same tensors as the test's own."""
    weights = load_weights(tiny(variant), ParallelContext.virtual_ranks(3), torch.float32)
    own = weights_of(weights.config, tiny.canonical(variant, weights.config), weights.context)
    assert set(weights.tensors) == set(own.tensors)
    for name, tensor in weights.tensors.items():
        assert torch.equal(tensor, own.tensors[name]), name


@pytest.mark.parametrize("variant", ["qwen3", "gpt-oss"])
def test_real_ranks_equal_transformers(ranks, tiny, variant):
    prompt = prompt_of(tiny.hf(variant).config.vocab_size, LENGTH)
    results = ranks(2).run(
        model_cases.rank_logits, path=str(tiny(variant)), prompt=prompt, schemes=["exact", "int4-group"]
    )
    for scheme in ("exact", "int4-group"):
        assert torch.equal(*(result[f"{scheme}.hidden"] for result in results)), f"replicas drift apart with {scheme}"
    assert_close(torch.cat([result["exact.logits"] for result in results], dim=1), tiny.hf_logits(variant, prompt))


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_equals_recomputing(tiny, variant):
    """Sequences of different lengths, one in chunks; then token by token, side by side."""
    config = config_of(tiny, variant)
    weights = weights_of(config, tiny.canonical(variant, config), ParallelContext.virtual_ranks(3))
    model = weights.build_with_scheme(parse_scheme("exact"))
    prompts = [prompt_of(config.vocab_size, length, start=length) for length in (30, 3, 17)]

    def whole(prompt):
        return model.head.precise_logits(model(TokenBatch.prompts([prompt], CPU)))

    cache = model.new_cache(3, 48)
    first = TokenBatch.prompts([prompts[0][:13], prompts[1][:1], prompts[2]], CPU)
    second = TokenBatch(torch.tensor(prompts[0][13:29] + prompts[1][1:2] + [5]), (16, 1, 1), (13, 1, 17))
    prompts[2].append(5)
    got = [model.head.precise_logits(model(batch, cache)) for batch in (first, second)]
    assert_close(torch.cat((got[0][:13], got[1][:16])), whole(prompts[0])[:29])
    assert_close(torch.cat((got[0][13:14], got[1][16:17])), whole(prompts[1])[:2])
    assert_close(torch.cat((got[0][14:], got[1][17:])), whole(prompts[2]))
    prompts = [prompts[0][:29], prompts[1][:2], prompts[2]]
    for step in range(6):
        news = [(5 * step + row) % config.vocab_size for row in range(3)]
        batch = TokenBatch(torch.tensor(news), (1, 1, 1), tuple(cache.lengths))
        logits = model.head.precise_logits(model(batch, cache))
        for row, new in enumerate(news):
            prompts[row].append(new)
            assert_close(logits[row], whole(prompts[row])[-1])
    assert_close(whole(prompts[0]), tiny.hf_logits(variant, prompts[0]))


def renamed(tensors, pattern, change):
    """The tensors with their names changed where the pattern matches."""
    return {re.sub(pattern, change, name): tensor for name, tensor in tensors.items()}


def scaled(tensors, ending, factor):
    return {name: tensor * (factor if name.endswith(ending) else 1) for name, tensor in tensors.items()}


def swap_gate_and_up(config, tensors):
    exchange = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    return config, renamed(tensors, r"(?<=\d\.)(gate_proj|up_proj)", lambda match: exchange[match[0]])


def permute_experts(config, tensors):
    return config, renamed(
        tensors, r"(?<=experts\.)\d+", lambda match: str((int(match[0]) + 1) % config.moe.num_experts)
    )


def flip_renormalisation(config, tensors):
    return replace(config, moe=replace(config.moe, renormalize=not config.moe.renormalize)), tensors


def transpose_down(config, tensors):
    return config, {
        name: tensor.T.contiguous() if ".experts." in name and name.endswith("down_proj.weight") else tensor
        for name, tensor in tensors.items()
    }


def read_halves(config, tensors):
    """gate and up as the two halves of what interleaves them."""
    changed = dict(tensors)
    for name, gate in tensors.items():
        if ".experts." in name and ".gate_proj." in name:
            other = name.replace("gate_proj", "up_proj")
            stored = torch.stack((gate, tensors[other]), dim=1).flatten(0, 1)
            changed[name], changed[other] = stored.chunk(2)
    return config, changed


EVERYWHERE = {
    "gate and up exchanged": swap_gate_and_up,
    "experts permuted": permute_experts,
    "softmax over all or over the chosen": flip_renormalisation,
    "one expert fewer": lambda config, tensors: (
        replace(config, moe=replace(config.moe, experts_per_token=config.moe.experts_per_token - 1)), tensors
    ),
}  # fmt: skip
MISTAKES = {
    "mixtral": {
        **EVERYWHERE,
        "window ignored": lambda config, tensors: (replace(config, sliding_layers=(), sliding_window=None), tensors),
    },
    "qwen3": {
        **EVERYWHERE,
        "norm of queries doubled": lambda config, tensors: (config, scaled(tensors, "q_norm.weight", 2.0)),
    },
    "qwen3-raw": EVERYWHERE,
    "gpt-oss": {
        **EVERYWHERE,
        "down transposed": transpose_down,
        "interleaved read as halves": read_halves,
        "router bias lost": lambda config, tensors: (config, scaled(tensors, ".gate.bias", 0.0)),
        "output bias lost": lambda config, tensors: (config, scaled(tensors, "down_proj.bias", 0.0)),
        "output bias once a rank": lambda config, tensors: (config, scaled(tensors, "down_proj.bias", 2.0)),
        "sinks ignored": lambda config, tensors: (config, scaled(tensors, "sinks", 1e4 * -1)),
        "another activation": lambda config, tensors: (replace(config, activation="silu"), tensors),
        "rotary embedding not stretched": lambda config, tensors: (replace(config, rope_scaling=None), tensors),
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", MISTAKES)
def test_mistakes_show(tiny, variant):
    """Deliberately wrong conversions are at least 100 times further off than the tolerance."""
    config = config_of(tiny, variant)
    tensors = tiny.canonical(variant, config)
    prompt = prompt_of(config.vocab_size, LENGTH)
    expected = tiny.hf_logits(variant, prompt)
    for mistake, make in MISTAKES[variant].items():
        wrong_config, wrong = make(config, tensors)
        logits = logits_of(weights_of(wrong_config, wrong, ParallelContext.virtual_ranks(2)), prompt)
        assert (logits - expected).abs().max() > 100 * TOLERANCE, mistake


@pytest.mark.parametrize("variant", VARIANTS)
def test_stored_parts_cover_the_file_once(tiny, variant):
    """Numbers of the stored tensors' elements: each is read into exactly one canonical tensor."""
    config = config_of(tiny, variant)
    stored = load_file(tiny(variant) / "model.safetensors")
    first, numbered = 0, {}
    for name, tensor in stored.items():
        numbered[name] = torch.arange(first, first + tensor.numel()).view(tensor.shape)
        first += tensor.numel()
    read = torch.cat([tensor.flatten() for tensor in follow_stored_parts(config, numbered).values()])
    assert torch.equal(read.sort().values, torch.arange(first))
    assert set(stored_parts(config)) <= set(tensor_sources(config))


@pytest.mark.parametrize("variant", VARIANTS)
def test_low_bits(tiny, variant):
    """Calibrated on virtual ranks, then 4 bits: it runs, moves the logits and does not destroy them.

    Unrelated logits would differ by sqrt(2) of their size. Random models suffer far more than trained ones: each token
    whose router tips over goes through another expert, and ranges of 12 short texts clip what comes later.
    """
    config = config_of(tiny, variant)
    weights = weights_of(config, tiny.canonical(variant, config), ParallelContext.virtual_ranks(3))
    calibration = calibrate(weights, [prompt_of(config.vocab_size, LENGTH, start) for start in range(12)], "0" * 64)
    paths = ("self_attn.o_proj", "mlp.down_proj")
    assert set(calibration.sync_points) == {
        f"layers.{layer}.{path}" for layer in range(config.num_layers) for path in paths
    }
    prompt = prompt_of(config.vocab_size, LENGTH, 7)
    expected = logits_of(weights, prompt)

    def error(scheme):
        return float((logits_of(weights, prompt, scheme, calibration) - expected).abs().mean() / expected.abs().mean())

    assert 1e-3 < error("int8-group") < 0.1 < error("int4-outlier") < 0.9
