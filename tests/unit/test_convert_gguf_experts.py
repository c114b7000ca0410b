"""GGUF files of mixtures of experts: all experts of a layer in one tensor, whatever the Hugging Face files do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from checkpoints_conv.gguf_reader import GGUFCheckpoint
from megatron_lowbit.checkpoint.reader import check_complete
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.models.registry import config_from_hf, tensor_sources

COMMON = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=37, head_dim=16,
    max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=[2],
)  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}
HF: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 96, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {
        "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 5, "num_experts_per_tok": 2,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "gpt_oss": {
        "intermediate_size": 32, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 8,
        "rope_scaling": YARN, "attention_bias": True,
    },
}  # fmt: skip
ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}
EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(\d+)\.(.+)")


def config_of(family: str) -> ModelConfig:
    hf = {"model_type": family, "rope_theta": 5000.0, **COMMON, **HF[family]}
    return config_from_hf(hf, "the test")


def random_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=source.shape).astype(np.float32) for name, source in tensor_sources(config).items()}


def stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As the converter does: experts of a layer together, in their order."""
    result: dict[str, np.ndarray] = {}
    groups: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = EXPERT.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            groups.setdefault(match[1] + match[3], {})[int(match[2])] = tensor
    return result | {name: np.stack([group[i] for i in range(len(group))]) for name, group in groups.items()}


def write_gguf(
    path: Path, family: str, tensors: dict[str, np.ndarray], kind: gguf.GGMLQuantizationType | None = None
) -> Path:
    """kind: how the matrices of experts are stored, None for FP32."""
    hf, architecture = {**COMMON, **HF[family]}, ARCHITECTURES[family]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_expert_count(5)
    writer.add_expert_used_count(2)
    if family != "mixtral":
        writer.add_expert_feed_forward_length(32)
    if family == "gpt_oss":
        writer.add_sliding_window(8)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, 2)
    for name, tensor in stacked(tensors).items():
        if family == "mixtral" and ("q_proj" in name or "k_proj" in name):
            heads = 4 if "q_proj" in name else 2
            tensor = tensor.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(tensor.shape)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        stored += ".weight" if name.endswith("sinks") else ""
        if kind is not None and tensor.ndim == 3:
            writer.add_tensor(stored, quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", HF)
def test_every_expert_comes_back(family: str, tmp_path: Path) -> None:
    config = config_of(family)
    tensors = random_tensors(config)
    reader = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", family, tensors))
    check_complete(reader, tensor_sources(reader.config))
    assert reader.config == config
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), torch.from_numpy(tensor)), name
        for dim in range(tensor.ndim):
            span = reader.read_span(name, dim, 1, 4)
            assert torch.equal(span, torch.from_numpy(tensor).narrow(dim, 1, 3)), (name, dim)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.MXFP4])
def test_quantised_experts(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    tensors = random_tensors(config_of("gpt_oss"))
    path = write_gguf(tmp_path / "m.gguf", "gpt_oss", tensors, kind)
    reader = GGUFCheckpoint(path)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    expected = torch.from_numpy(dequantize(quantize(tensors[name], kind), kind))
    assert torch.equal(reader.read(name), expected)
    assert not torch.equal(expected, torch.from_numpy(tensors[name]))


def test_one_expert_too_few(tmp_path: Path) -> None:
    tensors = random_tensors(config_of("mixtral"))
    fewer = {name: tensor for name, tensor in tensors.items() if "experts.4." not in name}
    with pytest.raises(ValueError, match=r"of 5 experts, tensor blk\.0\.ffn_gate_exps\.weight has shape \(4, "):
        GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", "mixtral", fewer))


def test_gate_and_up_exchanged_would_show(tmp_path: Path) -> None:
    tensors = random_tensors(config_of("mixtral"))
    gate, up = (f"model.layers.0.mlp.experts.2.{name}_proj.weight" for name in ("gate", "up"))
    reader = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", "mixtral", {**tensors, gate: tensors[up]}))
    assert torch.equal(reader.read(gate), reader.read(up))
    assert not torch.equal(reader.read(gate), torch.from_numpy(tensors[gate]))
