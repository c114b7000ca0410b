"""Every dense family beside Llama: whole models against transformers, their caches, and mistakes that must show."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import model_cases
from helpers.model_cases import logits_of, prompt_of
from helpers.tiny_models import FAMILIES

from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.weights import ModelWeights, load_weights

# FP32 rounding, derived in tests/unit/test_models_virtual_tp.py; soft caps and norms only make errors smaller
TOLERANCE = 1e-4
CPU = torch.device("cpu")
# Within the 20 tokens up to which phi3 takes its short frequencies, and beyond; both longer than any window
LENGTHS = (18, 45)
# what stretching 20 tokens to 96 makes of cosines and sines
PHI3_FACTOR = math.sqrt(1 + math.log(96 / 20) / math.log(20))


def hf_logits(tiny_models, family: str, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return tiny_models.hf(family)(torch.tensor([prompt])).logits[0]


def load(tiny_models, family: str, tp: int) -> ModelWeights:
    return load_weights(tiny_models(family), ParallelContext.virtual_ranks(tp), torch.float32)


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tiny_models, family, tp):
    weights = load(tiny_models, family, tp)
    for length in LENGTHS:
        prompt = prompt_of(weights.config.vocab_size, length)
        expected = hf_logits(tiny_models, family, prompt)
        torch.testing.assert_close(logits_of(weights, prompt), expected, rtol=0, atol=TOLERANCE)
        assert expected.std() > 0.5, "logits this flat would hide mistakes"


def test_both_heads_are_capped(tiny_models):
    """Sampling takes the product in the model's dtype, evaluation one in FP32: the same numbers in an FP32 model."""
    weights = load(tiny_models, "gemma2", 2)
    model = weights.build_with_scheme(parse_scheme("exact"))
    hidden_TH = model(TokenBatch.prompts([prompt_of(73, 18)], CPU))
    torch.testing.assert_close(model.head.logits(hidden_TH), model.head.precise_logits(hidden_TH), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_real_ranks_equal_transformers(tiny_models, ranks, family):
    """9 query heads and 3 of keys over 2 ranks: 5 and 4, with soft caps, windows and norms behind the sums."""
    prompt = prompt_of(71, 45)
    results = ranks(2).run(model_cases.rank_logits, path=str(tiny_models(family)), prompt=prompt, schemes=["exact"])
    assert torch.equal(results[0]["exact.hidden"], results[1]["exact.hidden"]), "replicas have drifted apart"
    logits = torch.cat([result["exact.logits"] for result in results], dim=1)
    torch.testing.assert_close(logits, hf_logits(tiny_models, family, prompt), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_and_low_bits_stay_close(tiny_models, family):
    """Every feature with bf16 weights (2^-9 a rounding, some 20 deep), and with sums that travel in 8 bits."""
    bf16 = load_weights(tiny_models(family), ParallelContext.virtual_ranks(3), torch.bfloat16)
    prompt = prompt_of(bf16.config.vocab_size, 45)
    expected = hf_logits(tiny_models, family, prompt)
    for weights, scheme in ((bf16, "exact"), (load(tiny_models, family, 3), "int8-group")):
        error = (logits_of(weights, prompt, scheme) - expected).abs().mean() / expected.abs().mean()
        assert 1e-3 < error < 0.1, f"{scheme}: {error}; not in use, or broken"


# ---- caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_decode_steps_equal_the_whole(tiny_models, family):
    """Three sequences of different lengths side by side, prefilled in uneven chunks, then decoded together.

    What is compared with is a pass over each whole sequence at once, over a cache of the same capacity, since long
    rotary frequencies go by that (phi3).
    """
    weights = load(tiny_models, family, 3)
    model = weights.build_with_scheme(parse_scheme("exact"))
    vocabulary, capacity = weights.config.vocab_size, 48
    sequences = [prompt_of(vocabulary, length, start=length) for length in (40, 8, 25)]
    expected = [model(TokenBatch.prompts([tokens], CPU), model.new_cache(1, capacity)) for tokens in sequences]
    cache = model.new_cache(3, capacity)
    done = [0, 0, 0]
    for chunk in ((17, 1, 2), (9, 1, 13), (1, 2, 6), (9, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)):
        pieces = [tokens[at : at + count] for tokens, at, count in zip(sequences, done, chunk, strict=True)]
        got = model(TokenBatch(torch.tensor([token for piece in pieces for token in piece]), chunk, tuple(done)), cache)
        for row, piece in enumerate(got.split(chunk)):
            whole = expected[row][done[row] : done[row] + chunk[row]]
            torch.testing.assert_close(piece, whole, rtol=0, atol=TOLERANCE)
        done = [at + count for at, count in zip(done, chunk, strict=True)]
    assert done == [39, 8, 25]


def test_a_cache_beyond_the_original_context_takes_long_frequencies(tiny_models):
    """Whatever it holds so far: cached keys cannot change over. transformers does from the 21st token on."""
    weights = load(tiny_models, "phi3", 1)
    model = weights.build_with_scheme(parse_scheme("exact"))
    prompt = prompt_of(weights.config.vocab_size, 45)
    expected = hf_logits(tiny_models, "phi3", prompt)
    small, large = model.new_cache(1, 20), model.new_cache(1, 45)
    within = TokenBatch.prompts([prompt[:18]], CPU)
    short = hf_logits(tiny_models, "phi3", prompt[:18])
    torch.testing.assert_close(model.head.precise_logits(model(within, small)), short, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(model.head.precise_logits(model(within, large)), expected[:18], rtol=0, atol=TOLERANCE)
    assert (short - expected[:18]).abs().max() > 100 * TOLERANCE
    both = model(TokenBatch.prompts([prompt[:18], prompt], CPU))  # without a cache, by the length of each
    torch.testing.assert_close(model.head.precise_logits(both), torch.cat((short, expected)), rtol=0, atol=TOLERANCE)


# ---- mistakes -------------------------------------------------------------------------------------------------------

Mistake = Callable[[ModelWeights], ModelWeights]


def configured(**changes: Any) -> Mistake:
    return lambda weights: replace(weights, config=replace(weights.config, **changes))


def rope(**changes: Any) -> Mistake:
    def change(weights: ModelWeights) -> ModelWeights:
        assert weights.config.rope_scaling is not None
        return configured(rope_scaling=replace(weights.config.rope_scaling, **changes))(weights)

    return change


def window(by: int) -> Mistake:
    def change(weights: ModelWeights) -> ModelWeights:
        assert weights.config.sliding_window is not None
        return configured(sliding_window=weights.config.sliding_window + by)(weights)

    return change


def moved(name: str, change: Callable[[torch.Tensor, Any], torch.Tensor]) -> Mistake:
    """One tensor of the second layer in another way."""

    def apply(weights: ModelWeights) -> ModelWeights:
        full = f"layers.1.{name}"
        return replace(weights, tensors={**weights.tensors, full: change(weights.tensors[full], weights.config)})

    return apply


def interleaved(qkv: torch.Tensor, config: Any) -> torch.Tensor:
    """Rows of query heads in the order of files that rotate neighbouring features."""
    queries = config.num_heads * config.head_dim
    heads = qkv[:queries].unflatten(0, (config.num_heads, 2, config.head_dim // 2))
    return torch.cat((heads.transpose(1, 2).flatten(0, 2), qkv[queries:]))


def key_and_value_exchanged(qkv: torch.Tensor, config: Any) -> torch.Tensor:
    rows = config.num_kv_heads * config.head_dim
    query, key, value = qkv.split((config.num_heads * config.head_dim, rows, rows))
    return torch.cat((query, value, key))


def gate_and_up_exchanged(both: torch.Tensor, config: Any) -> torch.Tensor:
    return both.roll(config.intermediate_size, 0)


EVERYWHERE: dict[str, Mistake] = {
    "queries in another order": moved("self_attn.qkv_proj.weight", interleaved),
    "key and value exchanged": moved("self_attn.qkv_proj.weight", key_and_value_exchanged),
    "gate and up exchanged": moved("mlp.gate_up_proj.weight", gate_and_up_exchanged),
    "heads of the output exchanged": moved("self_attn.o_proj.weight", lambda weight, config: weight.roll(1, 1)),
    "features of the ffn exchanged": moved("mlp.down_proj.weight", lambda weight, config: weight.roll(1, 1)),
}
WINDOWED: dict[str, Mistake] = {
    "window ignored": configured(sliding_layers=()),
    "window one too long": window(+1),
    "window one too short": window(-1),
}
BIASED: dict[str, Mistake] = {
    "attention biases lost": moved("self_attn.qkv_proj.bias", lambda bias, config: torch.zeros_like(bias)),
}
OUTPUT_BIASED: dict[str, Mistake] = {
    **BIASED,
    "output bias lost": moved("self_attn.o_proj.bias", lambda bias, config: torch.zeros_like(bias)),
}
NORMED: dict[str, Mistake] = {
    "norm of queries lost": moved("self_attn.q_norm.weight", lambda weight, config: torch.full_like(weight, 0.5)),
    "norms exchanged": moved("self_attn.k_norm.weight", lambda weight, config: weight.flip(0)),
}
SCALED = {"usual scale of scores": configured(attention_scale=None)}
GEMMA: dict[str, Mistake] = {
    "offset of norms dropped": configured(norm_offset=0.0),
    "token vectors not scaled": configured(embedding_scale=1.0),
    "other activation": configured(activation="silu"),
    "gelu without the approximation": configured(activation="gelu"),
}
MISTAKES: dict[str, dict[str, Mistake]] = {
    "mistral": {**EVERYWHERE, **WINDOWED},
    "gemma": {**EVERYWHERE, **OUTPUT_BIASED, **GEMMA},
    "gemma2": {
        **EVERYWHERE,
        **OUTPUT_BIASED,
        **WINDOWED,
        **GEMMA,
        **SCALED,
        "cap of scores ignored": configured(attention_softcap=None),
        "cap of logits ignored": configured(logits_softcap=None),
        "windows in the other layers": configured(sliding_layers=(False, True, False)),
        "norm behind the attention lost": moved("attention_post_norm.weight", lambda weight, config: 0 * weight),
        "norm behind the ffn lost": moved("mlp_post_norm.weight", lambda weight, config: 0 * weight),
        "norms of both sides exchanged": lambda weights: replace(
            weights,
            tensors={
                **weights.tensors,
                "layers.1.mlp_post_norm.weight": weights.tensors["layers.1.mlp_layernorm.weight"],
                "layers.1.mlp_layernorm.weight": weights.tensors["layers.1.mlp_post_norm.weight"],
            },
        ),
    },
    "gemma3_text": {
        **EVERYWHERE,
        **WINDOWED,
        **GEMMA,
        **NORMED,
        **SCALED,
        "one rotary embedding for all layers": configured(rope_local_theta=None),
        "windows turn like the others": configured(rope_local_theta=300.0),
        "rotary embedding not stretched": configured(rope_scaling=None),
        "cap of logits ignored": configured(logits_softcap=None),
    },
    "qwen2": {**EVERYWHERE, **BIASED, **WINDOWED, "window in all layers": configured(sliding_layers=(True,) * 3)},
    "qwen3": {
        **EVERYWHERE,
        **OUTPUT_BIASED,
        **NORMED,
        "rotary embedding not stretched": configured(rope_scaling=None),
        "cosines not multiplied": rope(attention_factor=1.0),
        "ramp not rounded": rope(truncate=False),
        "ramp elsewhere": rope(beta_slow=2.0),
    },
    "phi3": {
        **EVERYWHERE,
        **WINDOWED,
        "whole heads turned": configured(rotary_dim=None, rope_scaling=None),
        "rotary embedding not stretched": configured(rope_scaling=None),
        "short frequencies beyond the context": rope(original_max_position=64, attention_factor=PHI3_FACTOR),
        "cosines not multiplied": rope(attention_factor=1.0),
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_mistakes_show(tiny_models, family):
    """Each is far beyond what the comparisons above let pass."""
    weights = load(tiny_models, family, 1)
    prompt = prompt_of(weights.config.vocab_size, LENGTHS[-1])
    expected = hf_logits(tiny_models, family, prompt)
    for mistake, change in MISTAKES[family].items():
        moved_by = (logits_of(change(weights), prompt) - expected).abs().max()
        assert moved_by > 10 * TOLERANCE, f"{mistake}: only {moved_by}"
