"""GGUF files of every dense family, written the way llama.cpp's converter does: names, offsets, order, settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from checkpoints_conv.gguf_reader import GGUFCheckpoint
from megatron_lowbit.checkpoint.reader import check_complete
from megatron_lowbit.models.registry import config_from_hf, stored_parts, tensor_sources

VOCABULARY, LAYERS = 61, 3
SHAPES = dict(
    hidden_size=48, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=VOCABULARY, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    rms_norm_eps=1e-5, tie_word_embeddings=False,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """hf: settings of the Hugging Face model; metadata: what the converter writes beyond the common keys; plus: what it
    adds to the weights of norms; permuted: whether it interleaves rows of queries and keys."""

    model_type: str
    architecture: str
    hf: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    plus: float = 0.0
    permuted: bool = False
    theta: float = 10000.0


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5000.0}
FACTORS = [1.0, 1.25, 1.5, 2.0, 3.0, 4.5]
LONGROPE = {
    "rope_type": "longrope", "long_factor": FACTORS, "short_factor": [1.0] * 6, "rope_theta": 10000.0,
    "original_max_position_embeddings": 16, "partial_rotary_factor": 0.75,
}  # fmt: skip
CASES = {
    "mistral": Case(
        "mistral", "llama", {"sliding_window": 8, "rope_theta": 20000.0}, {"attention.sliding_window": 8},
        permuted=True, theta=20000.0,
    ),
    "nemo": Case("llama", "llama", {"head_dim": 20}, permuted=True),
    "gemma": Case("gemma", "gemma", {"tie_word_embeddings": True}, plus=1.0),
    "gemma2": Case(
        "gemma2", "gemma2",
        {
            "tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 8,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        },
        {"attention.sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, plus=1.0,
    ),
    "gemma3": Case(
        "gemma3_text", "gemma3",
        {
            "tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        {"attention.sliding_window": 8, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, plus=1.0, theta=1e6,
    ),
    "qwen2": Case(
        "qwen2", "qwen2", {"hidden_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, theta=1e6
    ),
    "qwen2-yarn": Case(
        "qwen2", "qwen2", {"hidden_size": 64, "rope_parameters": YARN},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
        theta=5000.0,
    ),
    "qwen3": Case("qwen3", "qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "phi3": Case(
        "phi3", "phi3",
        {"sliding_window": 8, "hidden_size": 64, "rope_parameters": LONGROPE,
         "original_max_position_embeddings": 16},
        {"attention.sliding_window": 8, "rope.dimension_count": 12, "rope.scaling.original_context_length": 16,
         "rope.scaling.attn_factor": float(np.float32((1 + np.log(4) / np.log(16)) ** 0.5))},
    ),
}  # fmt: skip


def random_model(case: Case) -> PreTrainedModel:
    """Weights are bf16 numbers, as in published checkpoints, and large enough that a mistake shows."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(case.model_type, **{**SHAPES, **case.hf})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for name, weight in model.named_parameters():
        around = 0.0 if case.plus else 1.0
        if "norm" in name:
            torch.nn.init.uniform_(weight, around - 0.4, around + 0.4)
        else:
            torch.nn.init.normal_(weight, 0.0, 0.3)
        weight.data = weight.data.bfloat16().float()
    return model


def interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    path: Path, case: Case, model: PreTrainedModel, plus: float | None = None, permuted: bool | None = None
) -> Path:
    """The names are those of the gguf package, which llama.cpp's converter uses."""
    config, plus = model.config, case.plus if plus is None else plus
    permuted = case.permuted if permuted is None else permuted
    writer = gguf.GGUFWriter(path, case.architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if case.architecture not in ("phi3", "qwen2"):  # those two converters leave it out
        writer.add_key_length(width)
        writer.add_value_length(width)
    if case.architecture == "llama":
        writer.add_rope_dimension_count(width)
    if case.architecture != "gemma2":
        writer.add_rope_freq_base(case.theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    kinds = {int: writer.add_uint32, str: writer.add_string, float: writer.add_float32}
    for key, value in case.metadata.items():
        kinds[type(value)](f"{case.architecture}.{key}", value)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == case.architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if permuted and ("q_proj" in name or "k_proj" in name):
            values = interleaved(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if name.endswith("norm.weight"):
            values = values + np.float32(plus)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored, np.ascontiguousarray(values))
    if case.model_type == "phi3":
        for kind in ("long", "short"):
            factors = config.rope_parameters[f"{kind}_factor"]
            writer.add_tensor(f"rope_factors_{kind}.weight", np.asarray(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def canonical(model: PreTrainedModel, reader: GGUFCheckpoint) -> dict[str, torch.Tensor]:
    """The model's tensors by canonical name, merged ones cut up."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    parts = stored_parts(reader.config)
    cut = {name: tensors[part.name][part.start : part.stop] for name, part in parts.items()}
    return {name: tensor for name, tensor in tensors.items() if name not in {p.name for p in parts.values()}} | cut


def logits(case: Case, reader: GGUFCheckpoint) -> torch.Tensor:
    """transformers' logits of 24 tokens with what the reader returns."""
    model = random_model(case)
    state = {name: reader.read(name) for name in reader.names()}
    for name, part in stored_parts(reader.config).items():
        merged = state.setdefault(part.name, torch.empty(part.shape))
        merged[part.start : part.stop] = state.pop(name)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    with torch.no_grad():
        return model(torch.arange(24).unsqueeze(0) % VOCABULARY).logits


@pytest.mark.parametrize("name", CASES)
def test_equals_the_model_it_was_made_from(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = random_model(case)
    reader = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", case, model))
    check_complete(reader, tensor_sources(reader.config))
    assert reader.config == config_from_hf(model.config.to_dict(), "transformers")
    for tensor, expected in canonical(model, reader).items():
        assert torch.equal(reader.read(tensor), expected), tensor
    with torch.no_grad():
        expected_logits = model(torch.arange(24).unsqueeze(0) % VOCABULARY).logits
    assert torch.equal(logits(case, reader), expected_logits)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.plus])
def test_an_offset_that_is_not_undone_shows(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    right = logits(case, GGUFCheckpoint(write_gguf(tmp_path / "a.gguf", case, random_model(case))))
    wrong = logits(case, GGUFCheckpoint(write_gguf(tmp_path / "b.gguf", case, random_model(case), plus=0.0)))
    assert (right - wrong).abs().max() > 0.05 * right.abs().max()


@pytest.mark.parametrize("name", ["mistral", "nemo", "qwen2", "qwen3", "gemma3"])
def test_rows_in_the_order_of_another_family_show(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    right = logits(case, GGUFCheckpoint(write_gguf(tmp_path / "a.gguf", case, random_model(case))))
    wrong_file = write_gguf(tmp_path / "b.gguf", case, random_model(case), permuted=not case.permuted)
    wrong = logits(case, GGUFCheckpoint(wrong_file))
    assert (right - wrong).abs().max() > 0.02 * right.abs().max()


def test_small_weights_of_norms_survive_the_offset(tmp_path: Path) -> None:
    """In FP32 1 + w keeps every bf16 w from 2^-16 on; 1 + w in bf16 keeps 7 bits behind the point."""
    case = CASES["gemma3"]
    model = random_model(case)
    name = "model.norm.weight"
    weights = dict(model.named_parameters())[name]
    weights.data = (torch.randn_like(weights) * 2**-12).clamp(min=2**-16).bfloat16().float()
    reader = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", case, model))
    assert torch.equal(reader.read(name), weights.data)
    assert torch.equal(reader.read_span(name, 0, 3, 9), weights.data[3:9])
    assert not torch.equal((weights.data + 1).bfloat16().float() - 1, weights.data)


def test_the_27b_models_scale_scores_their_own_way(tmp_path: Path) -> None:
    """llama.cpp tells them by their number of layers: 1 / sqrt(hidden / heads) in place of 1 / sqrt(head width)."""
    for name, layers in (("gemma2", 46), ("gemma3", 62)):
        case = CASES[name]
        few = GGUFCheckpoint(write_gguf(tmp_path / f"{name}.gguf", case, random_model(case)))
        assert few.config.attention_scale == 16**-0.5
        many = Case(case.model_type, case.architecture, {**case.hf, "num_hidden_layers": layers}, case.metadata, 1.0)
        reader = GGUFCheckpoint(write_gguf(tmp_path / f"{name}-27b.gguf", many, random_model(many)))
        assert reader.config.attention_scale == (48 // 4) ** -0.5


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("qwen2", {"attention.sliding_window": 8}, "a sliding window, which models of qwen2 do not have"),
        ("qwen3", {"rope.dimension_count": 8}, "qwen3 has all"),
        ("gemma2", {"expert_count": 4}, "a mixture of experts, which is not supported for gemma2"),
        ("gemma3", {"attention.scale": 0.5}, "attention.scale is 0.5"),
        ("phi3", {"rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5"),
    ],
)
def test_settings_that_another_family_would_have(
    name: str, metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    case = CASES[name]
    odd = Case(case.model_type, case.architecture, case.hf, {**case.metadata, **metadata}, case.plus, theta=case.theta)
    with pytest.raises(ValueError, match=message):
        GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", odd, random_model(odd)))


def test_soft_caps_must_be_said(tmp_path: Path) -> None:
    case = CASES["gemma2"]
    silent = Case("gemma2", "gemma2", case.hf, {"attention.sliding_window": 8}, 1.0)
    with pytest.raises(ValueError, match="attn_logit_softcapping is None"):
        GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", silent, random_model(silent)))
