"""config.json of the dense families: the numbers of published models, defaults of absent keys, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.registry import FAMILIES, config_from_hf, stored_parts, tensor_sources

# the keys of the published files that decide what is computed
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-2-13b": (
        13_015_864_320,
        dict(
            model_type="llama", hidden_size=5120, intermediate_size=13824, max_position_embeddings=4096,
            num_attention_heads=40, num_hidden_layers=40, num_key_value_heads=40, rms_norm_eps=1e-5, vocab_size=32000,
        ),
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        dict(
            model_type="mistral", hidden_size=4096, intermediate_size=14336, max_position_embeddings=32768,
            num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, sliding_window=4096, vocab_size=32000,
        ),
    ),
    "Mistral-Nemo": (
        12_247_782_400,
        dict(
            model_type="mistral", head_dim=128, hidden_size=5120, intermediate_size=14336, num_attention_heads=32,
            max_position_embeddings=128000, num_hidden_layers=40, num_key_value_heads=8, rope_theta=1e6,
            sliding_window=None, vocab_size=131072,
        ),
    ),
    "gemma-2-27b": (
        27_227_128_320,
        dict(
            model_type="gemma2", head_dim=128, hidden_size=4608, intermediate_size=36864, num_attention_heads=32,
            num_hidden_layers=46, num_key_value_heads=16, query_pre_attn_scalar=144, vocab_size=256000,
            hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
        ),
    ),
    "gemma-3-27b": (
        27_009_002_240,
        dict(
            model_type="gemma3_text", head_dim=128, hidden_size=5376, intermediate_size=21504, num_attention_heads=32,
            num_hidden_layers=62, num_key_value_heads=16, query_pre_attn_scalar=168, vocab_size=262144,
            rope_scaling=dict(rope_type="linear", factor=8.0), sliding_window=1024, sliding_window_pattern=6,
            rope_theta=1e6, rope_local_base_freq=1e4,
        ),
    ),
    "Qwen2.5-7B": (
        7_615_616_512,
        dict(
            model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_hidden_layers=28,
            max_position_embeddings=131072, num_key_value_heads=4, rope_theta=1e6, sliding_window=131072,
            use_sliding_window=False, max_window_layers=28, vocab_size=152064,
        ),
    ),
    "Qwen3-0.6B": (
        596_049_920,
        dict(
            model_type="qwen3", head_dim=128, hidden_size=1024, intermediate_size=3072, num_attention_heads=16,
            num_hidden_layers=28, num_key_value_heads=8, tie_word_embeddings=True, vocab_size=151936,
        ),
    ),
    "phi-4": (
        14_659_507_200,
        dict(
            model_type="phi3", hidden_size=5120, intermediate_size=17920, num_attention_heads=40, num_hidden_layers=40,
            max_position_embeddings=16384, original_max_position_embeddings=16384, num_key_value_heads=10,
            rope_theta=250000, vocab_size=100352, sliding_window=None,
        ),
    ),
}  # fmt: skip
SIZES = dict(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=7, intermediate_size=8, vocab_size=9
)


def read(name: str) -> ModelConfig:
    return config_from_hf(PUBLISHED[name][1], name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_number_of_parameters(name):
    """That is, every tensor, bias and norm is in the table once, with its shape."""
    config = read(name)
    assert sum(math.prod(source.shape) for source in tensor_sources(config).values()) == PUBLISHED[name][0]
    assert ModelConfig.from_json(config.to_json(), name) == config


def test_features_of_published_models():
    mistral = read("Mistral-7B-v0.1")
    assert mistral.sliding_layers == (True,) * 32 and mistral.window_of(31) == 4096
    nemo = read("Mistral-Nemo")
    assert nemo.head_dim == 128 and nemo.window_of(0) is None
    gemma2 = read("gemma-2-27b")
    assert gemma2.attention_scale == 144**-0.5 and (gemma2.attention_softcap, gemma2.logits_softcap) == (50.0, 30.0)
    assert [gemma2.window_of(layer) for layer in range(4)] == [4096, None, 4096, None]
    assert gemma2.embedding_scale == 4608**0.5 and gemma2.tie_embeddings and gemma2.activation == "gelu_tanh"
    gemma3 = read("gemma-3-27b")
    assert [layer for layer in range(62) if gemma3.window_of(layer) is None] == list(range(5, 62, 6))
    assert (gemma3.rope_theta, gemma3.rope_local_theta) == (1e6, 1e4) and gemma3.rope_scaling is not None
    assert gemma3.qk_norm and gemma3.post_norms and gemma3.attention_softcap is None and gemma3.norm_offset == 1.0
    qwen2 = read("Qwen2.5-7B")
    assert qwen2.attention_bias and not qwen2.attention_output_bias and qwen2.sliding_layers == ()
    qwen3 = read("Qwen3-0.6B")
    assert qwen3.qk_norm and not qwen3.attention_bias and qwen3.norm_offset == 0.0
    assert read("phi-4").rope_theta == 250000.0 and read("phi-4").rotary_dim is None


@pytest.mark.parametrize("kind", ["mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi3"])
def test_absent_keys_mean_what_they_mean_in_transformers(kind):
    """transformers writes its defaults out; a file without them is the same model."""
    from transformers import AutoConfig

    written_out = AutoConfig.for_model(kind, **SIZES).to_dict()
    bare = dict(SIZES, model_type=kind)
    if kind == "gemma3_text":  # its file may leave out everything
        bare, written_out = {"model_type": kind}, AutoConfig.for_model(kind).to_dict()
    assert config_from_hf(bare, "bare") == config_from_hf(written_out, "written out")


def test_nested_text_config():
    """Files of the models that see: shapes below `text_config`, most of them left out, end tokens outside."""
    text = dict(
        model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, sliding_window=1024,
        rope_scaling=dict(rope_type="linear", factor=8.0),
    )  # fmt: skip
    config = config_from_hf(dict(model_type="gemma3", eos_token_id=[1, 106], text_config=text), "config.json")
    assert sum(math.prod(source.shape) for source in tensor_sources(config).values()) == 3_880_263_168
    assert config.eos_token_ids == (1, 106) and config.num_heads == 8 and config.vocab_size == 262_208
    with pytest.raises(ValueError, match="'text_config' is missing"):
        config_from_hf(dict(model_type="gemma3"), "config.json")


def test_rope_parameters_by_layer_type():
    """As transformers 5 writes them."""
    nested = dict(
        full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
        sliding_attention=dict(rope_type="default", rope_theta=1e4),
    )
    base = dict(SIZES, model_type="gemma3_text")
    new = config_from_hf(dict(base, rope_parameters=nested), "new")
    old = config_from_hf(dict(base, rope_scaling=dict(rope_type="linear", factor=8.0)), "old")
    assert new == old
    nested["sliding_attention"] = dict(rope_type="linear", factor=8.0, rope_theta=1e4)
    with pytest.raises(ValueError, match="'sliding_attention' layers is scaled"):
        config_from_hf(dict(base, rope_parameters=nested), "new")


def test_layer_types_go_before_patterns():
    kinds = ["full_attention"] * 6 + ["sliding_attention"]
    for kind in ("gemma2", "gemma3_text", "qwen2", "mistral"):
        hf = dict(SIZES, model_type=kind, layer_types=kinds, use_sliding_window=True, sliding_window=5)
        assert config_from_hf(hf, kind).sliding_layers == (False,) * 6 + (True,)
    pattern = config_from_hf(dict(SIZES, model_type="gemma3_text", sliding_window_pattern=2), "pattern")
    assert pattern.sliding_layers == (True, False, True, False, True, False, True)
    qwen = config_from_hf(dict(SIZES, model_type="qwen3", use_sliding_window=True, max_window_layers=5), "qwen")
    assert qwen.sliding_layers == (False,) * 5 + (True,) * 2 and qwen.sliding_window == 4096


def test_phi3_reads_the_names_of_its_time():
    scaling = dict(type="su", short_factor=[1.0] * 8, long_factor=[2.0] * 8)
    hf = dict(
        SIZES, model_type="phi3", max_position_embeddings=131072, original_max_position_embeddings=4096,
        rope_scaling=scaling,
    )  # fmt: skip
    found = config_from_hf(hf, "config.json").rope_scaling
    assert found is not None and (found.kind, found.factor, found.original_max_position) == ("longrope", 32.0, 4096)
    partial = config_from_hf(dict(hf, partial_rotary_factor=0.75, rope_scaling=None), "config.json")
    assert partial.rotary_dim == 12
    with pytest.raises(ValueError, match="8 long_factors of the rotary embedding, there must be 6"):
        config_from_hf(dict(hf, partial_rotary_factor=0.75), "config.json")


def test_merged_tensors_of_phi3_are_covered_exactly_once():
    config = config_from_hf(dict(SIZES, model_type="phi3"), "config.json")
    rows: dict[str, list[int]] = {}
    sources = tensor_sources(config)
    for name, part in stored_parts(config).items():
        assert part.stop is not None and (part.stop - part.start, 64) == sources[name].shape
        rows.setdefault(part.name, []).extend(range(part.start, part.stop))
        assert part.name not in sources and part.shape[1] == 64 and part.index is None and not part.transposed
    assert len(rows) == 2 * 7 and rows["model.layers.6.self_attn.qkv_proj.weight"] == list(range((4 + 2 + 2) * 16))
    assert rows["model.layers.0.mlp.gate_up_proj.weight"] == list(range(16))
    order = ["q_proj", "k_proj", "v_proj"]
    starts = [stored_parts(config)[f"model.layers.0.self_attn.{name}.weight"].start for name in order]
    assert starts == [0, 64, 96]


def test_every_family_is_registered_under_its_name():
    """What a converted checkpoint says of its family leads back to the module that made it."""
    for kind in ("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi3"):
        config = config_from_hf(dict(SIZES, model_type=kind), kind)
        assert kind in FAMILIES[config.family].MODEL_TYPES


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", dict(attention_chunk_size=8192), "attention_chunk_size is 8192, which changes what the model"),
        ("llama", dict(quantization_config=dict(quant_method="gptq")), "quantization_config is .*gptq"),
        ("gemma3_text", dict(use_bidirectional_attention=True), "use_bidirectional_attention is True"),
        ("gemma3_text", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0"),
        ("gemma2", dict(hidden_activation="relu"), "hidden_activation is 'relu'; supported: silu"),
        ("qwen2", dict(layer_types=["chunked_attention"] * 7), "layer_types has 'chunked_attention'"),
        ("qwen3", dict(layer_types=["sliding_attention"] * 7), "sliding_window is null"),
        ("mistral", dict(layer_types=["sliding_attention"]), "1 entries say which of 7 layers"),
        ("mistral", dict(sliding_window=0), "sliding_window is 0"),
        ("qwen2", dict(rope_scaling=dict(type="mrope")), "rope type 'mrope' is not supported"),
        ("phi3", dict(num_hidden_layers=None), "num_hidden_layers"),
        ("phi3", dict(hidden_size="64"), "hidden_size is '64', it must be a whole number"),
        ("llama", dict(rms_norm_eps=None, rope_theta=-1.0), "rope_theta is -1.0, it must be above 0"),
        ("llama", dict(rms_norm_eps="small"), "rms_norm_eps is 'small', it must be a number"),
        ("llama", dict(eos_token_id="</s>"), "eos_token_id is '</s>', it must be a token id"),
        ("llama", dict(rope_scaling=[1]), "rope_parameters or rope_scaling is .1., it must be an object"),
        ("llama", dict(rope_scaling=dict(type="linear", factor=[2])), "rope type 'linear': "),
        ("llama", dict(hidden_act=["silu"]), "hidden_act is"),
        ("llama", dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, it must be a whole number of at"),
        ("phi3", dict(partial_rotary_factor=1.5), "partial_rotary_factor is 1.5"),
        ("qwen2", dict(layer_types="sliding_attention"), "it must be a list"),
        ("gemma2", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar is 0.0"),
        ("gemma2", dict(attn_logit_softcapping=0.0), "attention_softcap is 0.0, it must be above 0"),
        ("gemma3_text", dict(sliding_window_pattern=0), "sliding_window_pattern is 0"),
        ("gemma3_text", dict(rope_parameters=dict(full_attention=[1])), "each layer type must have an object"),
    ],
)
def test_what_changes_numbers_is_refused_by_name(kind, change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**SIZES, "model_type": kind, **change}, "config.json")


def test_harmless_keys_are_ignored():
    extra = dict(torch_dtype="bfloat16", use_cache=True, initializer_range=0.02, cache_implementation="hybrid", new=1)
    for kind in ("llama", "gemma2", "qwen3", "phi3"):
        hf = dict(SIZES, model_type=kind)
        assert config_from_hf({**hf, **extra}, "a") == config_from_hf(hf, "b")


JUNK = (None, "x", -1, 0, 1.5, True, [], [None], {}, {"rope_type": "yarn"}, math.inf, math.nan, 2**70)
EVERY_KEY = dict(
    SIZES, head_dim=16, max_position_embeddings=64, rms_norm_eps=1e-6, hidden_act="silu", rope_theta=1e4,
    bos_token_id=1, eos_token_id=2, rope_scaling=None, rope_parameters=None, partial_rotary_factor=None,
    tie_word_embeddings=True, sliding_window=64, layer_types=None, hidden_activation="silu", query_pre_attn_scalar=9,
    attn_logit_softcapping=None, final_logit_softcapping=9.0, sliding_window_pattern=2, rope_local_base_freq=1e4,
    max_window_layers=2, use_sliding_window=True, attention_bias=False, original_max_position_embeddings=8,
)  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "gemma", "gemma2", "gemma3_text", "gemma3", "qwen2", "qwen3", "phi3"]
)
def test_damaged_values_are_refused_or_read(kind):
    """Whatever stands in a file: a model, or a ValueError, which the commands print in one line."""
    read = 0
    for key in (*EVERY_KEY, "text_config"):
        for junk in JUNK:
            hf = dict(EVERY_KEY, model_type=kind)
            if kind == "gemma3" and key != "text_config":
                hf = dict(model_type=kind, text_config={**EVERY_KEY, key: junk})
            else:
                hf[key] = junk
            try:
                config = config_from_hf(hf, "config.json")
            except ValueError:
                continue
            read += 1
            assert isinstance(config, ModelConfig) and tensor_sources(config)
    assert read > 20
