"""config.json of the families with experts: the numbers of published models, defaults, and what is refused."""

from __future__ import annotations

import math

import pytest

from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.registry import config_from_hf, stored_parts, tensor_sources

# the keys of the published files that decide what is computed
MIXTRAL_8X7B = dict(
    model_type="mixtral", hidden_size=4096, intermediate_size=14336, max_position_embeddings=32768,
    num_attention_heads=32, num_experts_per_tok=2, num_hidden_layers=32, num_key_value_heads=8, num_local_experts=8,
    rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None, tie_word_embeddings=False, vocab_size=32000,
    hidden_act="silu", bos_token_id=1, eos_token_id=2,
)  # fmt: skip
QWEN3_30B_A3B = dict(
    model_type="qwen3_moe", attention_bias=False, decoder_sparse_step=1, head_dim=128, hidden_act="silu",
    hidden_size=2048, intermediate_size=6144, max_position_embeddings=40960, max_window_layers=48, mlp_only_layers=[],
    moe_intermediate_size=768, norm_topk_prob=True, num_attention_heads=32, num_experts=128, num_experts_per_tok=8,
    num_hidden_layers=48, num_key_value_heads=4, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1e6,
    sliding_window=None, tie_word_embeddings=False, use_sliding_window=False, vocab_size=151936,
)  # fmt: skip
GPT_OSS_20B = dict(
    model_type="gpt_oss", attention_bias=True, eos_token_id=200002, head_dim=64, hidden_act="silu", hidden_size=2880,
    intermediate_size=2880, layer_types=["sliding_attention", "full_attention"] * 12, max_position_embeddings=131072,
    num_attention_heads=64, num_experts_per_tok=4, num_hidden_layers=24, num_key_value_heads=8, num_local_experts=32,
    quantization_config=dict(quant_method="mxfp4"), rms_norm_eps=1e-5, rope_theta=150000, sliding_window=128,
    rope_scaling=dict(
        beta_fast=32.0, beta_slow=1.0, factor=32.0, original_max_position_embeddings=4096, rope_type="yarn",
        truncate=False,
    ), swiglu_limit=7.0, tie_word_embeddings=False, vocab_size=201088,
)  # fmt: skip


@pytest.mark.parametrize(
    ("hf", "millions"),
    [(MIXTRAL_8X7B, 46_703), (QWEN3_30B_A3B, 30_532), (GPT_OSS_20B, 20_915)],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_published_sizes(hf, millions):
    """The parameter counts that the model cards give: 46.7, 30.5 and 20.9 billion."""
    config = config_from_hf(hf, "config.json")
    sources = tensor_sources(config)
    assert round(sum(math.prod(source.shape) for source in sources.values()) / 1e6) == millions
    assert ModelConfig.from_json(config.to_json(), "again") == config
    parts = stored_parts(config)
    stored = {part.name: part.shape for part in parts.values()}
    plain = [name for name in sources if name not in parts]
    count = sum(math.prod(shape) for shape in [*stored.values(), *(sources[name].shape for name in plain)])
    assert round(count / 1e6) == millions, "the stored tensors hold as many"


def test_mixtral():
    config = config_from_hf(MIXTRAL_8X7B, "config.json")
    assert config.moe is not None
    assert (config.moe.num_experts, config.moe.experts_per_token, config.moe.intermediate_size) == (8, 2, 14336)
    assert config.moe.renormalize and not config.moe.router_bias and config.window_of(0) is None
    windowed = config_from_hf({**MIXTRAL_8X7B, "sliding_window": 4096}, "config.json")
    assert [windowed.window_of(layer) for layer in (0, 31)] == [4096, 4096]
    part = stored_parts(config)["model.layers.31.mlp.experts.7.down_proj.weight"]
    assert (part.name, part.shape) == ("model.layers.31.block_sparse_moe.experts.7.w2.weight", (4096, 14336))
    parts = stored_parts(config)
    assert parts["model.layers.0.mlp.experts.2.gate_proj.weight"].name.endswith("experts.2.w1.weight")
    assert parts["model.layers.0.mlp.experts.2.up_proj.weight"].name.endswith("experts.2.w3.weight")


@pytest.mark.parametrize(
    ("change", "dense"),
    [
        ({}, ()),
        ({"mlp_only_layers": [2, 5]}, (2, 5)),
        ({"num_hidden_layers": 7, "decoder_sparse_step": 3}, (0, 1, 3, 4, 6)),
        ({"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [1]}, (0, 1, 2, 4)),
        ({"mlp_only_layers": None}, ()),
    ],
)
def test_dense_layers_of_qwen3(change, dense):
    config = config_from_hf({**QWEN3_30B_A3B, **change}, "config.json")
    assert config.moe is not None and config.moe.dense_layers == dense
    names = set(tensor_sources(config))
    for layer in range(config.num_layers):
        assert config.is_moe(layer) == (layer not in dense)
        assert (f"model.layers.{layer}.mlp.gate.weight" in names) == (layer not in dense)
        assert (f"model.layers.{layer}.mlp.up_proj.weight" in names) == (layer in dense)


def test_qwen3_features():
    config = config_from_hf(QWEN3_30B_A3B, "config.json")
    assert config.qk_norm and not config.attention_bias and config.moe.renormalize and config.window_of(0) is None
    assert not config_from_hf({**QWEN3_30B_A3B, "norm_topk_prob": False}, "config.json").moe.renormalize
    without = {key: value for key, value in QWEN3_30B_A3B.items() if key not in ("norm_topk_prob", "num_experts")}
    defaults = config_from_hf(without, "config.json").moe
    assert (defaults.renormalize, defaults.num_experts) == (False, 128)
    assert config_from_hf({**without, "num_local_experts": 60}, "config.json").moe.num_experts == 60


def test_gpt_oss():
    config = config_from_hf(GPT_OSS_20B, "config.json")
    assert config.moe is not None and config.moe.router_bias and config.moe.expert_bias and config.attention_sinks
    assert config.attention_bias and config.attention_output_bias and config.activation == "swiglu_clamped"
    assert [config.window_of(layer) for layer in range(4)] == [128, None, 128, None]
    assert config.rope_scaling is not None and not config.rope_scaling.truncate and config.rope_theta == 150000
    bare = {
        key: value for key, value in GPT_OSS_20B.items()
        if key not in ("layer_types", "rope_scaling", "rope_theta", "sliding_window", "attention_bias", "head_dim")
    }  # fmt: skip
    assert config_from_hf(bare, "config.json") == config, "the defaults of transformers are the published values"
    part = stored_parts(config)["model.layers.3.mlp.experts.31.up_proj.weight"]
    assert part.name == "model.layers.3.mlp.experts.gate_up_proj" and part.shape == (32, 2880, 5760)
    assert (part.index, part.transposed, part.start, part.stop, part.step) == (31, True, 1, 5760, 2)


@pytest.mark.parametrize(
    ("hf", "change", "message"),
    [
        (GPT_OSS_20B, {"swiglu_limit": 10.0}, "swiglu_limit is 10.0; supported: 7.0"),
        (GPT_OSS_20B, {"swiglu_alpha": 1.5}, "swiglu_alpha is 1.5; supported: 1.702"),
        (GPT_OSS_20B, {"quantization_config": {"quant_method": "awq"}}, "quantised .'awq'.*'mxfp4'"),
        (GPT_OSS_20B, {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        (GPT_OSS_20B, {"layer_types": ["chunked_attention"] * 24}, "layer_types has 'chunked_attention'"),
        (GPT_OSS_20B, {"num_local_experts": 3}, "4 experts a token of 3"),
        (MIXTRAL_8X7B, {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": "2"}, "num_experts_per_tok is '2', it must be a whole number"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 0}, "decoder_sparse_step is 0, it must be at least 1"),
        (QWEN3_30B_A3B, {"moe_intermediate_size": 0}, "an expert has 0 features"),
    ],
)
def test_what_is_refused(hf, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        config_from_hf({**hf, **change}, "there/config.json")
    assert "experts a token" in message or "an expert" in message or "there/config.json" in str(caught.value)
