"""GGUF files: names, dequantisation, the order of query and key rows, metadata; and damaged files."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from checkpoints_conv.convert import convert, open_source
from checkpoints_conv.families.llama import LLAMA
from checkpoints_conv.gguf_file import canonical_name
from checkpoints_conv.gguf_header import GGUFHeader
from checkpoints_conv.gguf_reader import GGUFCheckpoint
from checkpoints_conv.gguf_rope import llama3_divisors
from megatron_lowbit.checkpoint.fingerprint import fingerprint
from megatron_lowbit.checkpoint.open import open_checkpoint
from megatron_lowbit.checkpoint.reader import check_complete
from megatron_lowbit.models.registry import tensor_sources

F32, Q8_0, Q4_1 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1
HIDDEN, HEADS, KV_HEADS, WIDTH, FFN, VOCABULARY, LAYERS = 96, 3, 1, 32, 64, 50, 2


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(11)
    model = LlamaForCausalLM(llama_config())
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    directory = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(directory)
    return directory


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key rows: the two halves of each head become neighbours."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def gguf_name(name: str) -> str:
    """The stored name, written down here apart from the reader's table."""
    table = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers.": "blk.",
        "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "lm_head": "output",
    }  # fmt: skip
    for canonical, stored in table.items():
        name = name.replace(canonical, stored)
    return name


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    kind: gguf.GGMLQuantizationType = F32,
    architecture: str = "llama",
    permute: bool = True,
    extra: dict[str, Any] | None = None,
) -> Path:
    """A Llama file as llama.cpp's converter writes it: norms in F32, matrices in `kind`."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(WIDTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"token{i}" for i in range(VOCABULARY)])
    writer.add_token_scores([-float(i) for i in range(VOCABULARY)])
    writer.add_token_types([2, 3, 3] + [1] * (VOCABULARY - 3))
    writer.add_array("test.numbers", [0.5] * 5000)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (extra or {}).items():
        {int: writer.add_uint32, str: writer.add_string, float: writer.add_float32}[type(value)](key, value)
    for name, tensor in tensors.items():
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
        stored = permuted(tensor, heads) if permute and heads else tensor
        if stored.ndim == 2 and kind != F32:
            writer.add_tensor(gguf_name(name), quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tensors(model_dir: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_file(model_dir / "model.safetensors").items()}


@pytest.fixture(scope="module")
def exact_file(tensors: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", tensors)


def test_equals_the_checkpoint_it_was_made_from(
    model_dir: Path, exact_file: Path, tensors: dict[str, np.ndarray]
) -> None:
    reader, original = GGUFCheckpoint(exact_file), open_checkpoint(model_dir)
    check_complete(reader, tensor_sources(reader.config))
    assert reader.config == original.config
    assert reader.config.rms_norm_eps == 1e-5 and reader.config.tie_embeddings
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), torch.from_numpy(tensor)), name
    assert fingerprint(reader) == fingerprint(original)


@pytest.mark.parametrize("kind", [Q8_0, Q4_1])
def test_dequantised_rows_in_canonical_order(
    tensors: dict[str, np.ndarray], tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    reader = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tensors, kind))
    for name, tensor in tensors.items():
        # quantisation works along rows, so moving rows and quantising commute
        expected = tensor if tensor.ndim == 1 else dequantize(quantize(tensor, kind), kind)
        assert torch.equal(reader.read(name), torch.from_numpy(expected)), name
        for dim in range(tensor.ndim):
            for start, stop in ((0, 1), (5, 29), (17, 32), (9, 9)):
                span = reader.read_span(name, dim, start, stop)
                assert torch.equal(span, torch.from_numpy(expected).narrow(dim, start, stop - start)), (name, dim)


def test_a_wrong_row_order_is_caught(
    model_dir: Path, exact_file: Path, tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Rows in the wrong order load without complaint and give a wrong model, so the comparison must see it."""
    wrong = GGUFCheckpoint(write_gguf(tmp_path / "wrong.gguf", tensors, permute=False))
    right = GGUFCheckpoint(exact_file)
    tokens = torch.arange(12).unsqueeze(0)
    reference = LlamaForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        expected = reference(tokens).logits
        logits = {}
        for label, reader in (("right", right), ("wrong", wrong)):
            model = LlamaForCausalLM(llama_config())
            model.load_state_dict({name: reader.read(name) for name in reader.names()}, strict=False)
            model.tie_weights()
            logits[label] = model(tokens).logits
    assert torch.equal(logits["right"], expected)
    assert (logits["wrong"] - expected).abs().max() > 0.05 * expected.abs().max()
    for kind in ("q", "k"):
        name = f"model.layers.0.self_attn.{kind}_proj.weight"
        assert not torch.equal(wrong.read(name), torch.from_numpy(tensors[name]))


def test_biases_are_reordered_too(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    biased = dict(tensors)
    for layer in range(LAYERS):
        for kind, rows in (("q", HEADS * WIDTH), ("k", KV_HEADS * WIDTH), ("v", KV_HEADS * WIDTH), ("o", HIDDEN)):
            biased[f"model.layers.{layer}.self_attn.{kind}_proj.bias"] = rng.normal(size=rows).astype(np.float32)
    reader = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", biased))
    check_complete(reader, tensor_sources(reader.config))
    assert reader.config.attention_bias and not reader.config.mlp_bias
    for name, tensor in biased.items():
        assert torch.equal(reader.read(name), torch.from_numpy(tensor)), name


def test_converts_like_the_original(model_dir: Path, exact_file: Path, tmp_path: Path) -> None:
    convert(exact_file, tmp_path / "a", 2, torch.bfloat16)
    convert(model_dir, tmp_path / "b", 2, torch.bfloat16)
    assert (tmp_path / "a" / "tokenizer.model").is_file()
    for name in ("rank-00-of-02.safetensors", "rank-01-of-02.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_untied_head_and_split_names(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    untied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}
    reader = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", untied))
    assert not reader.config.tie_embeddings
    check_complete(reader, tensor_sources(reader.config))
    assert canonical_name(LLAMA, "blk.3.ffn_gate.0.weight") == "blk.3.ffn_gate.0.weight"
    assert canonical_name(LLAMA, "output_norm.weight") == "model.norm.weight"


def test_llama3_scaling_is_recovered(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 100000.0,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, rope_parameters=scaling)
    plain = 100000.0 ** -(torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    divisors = (plain / scaled).float()
    # transformers computes in fp32: a handful of roundings of 2^-24 each
    assert torch.allclose(divisors.double(), llama3_divisors(100000.0, WIDTH, 32.0), rtol=1e-5)
    reader = GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tensors | {"rope_freqs.weight": divisors.numpy()}))
    check_complete(reader, tensor_sources(reader.config))
    assert reader.config.rope_scaling is not None
    assert math.isclose(reader.config.rope_scaling.factor, 32.0, rel_tol=1e-6)
    odd = divisors.numpy() ** 2
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not the frequency scaling of Llama 3"):
        GGUFCheckpoint(write_gguf(tmp_path / "odd.gguf", tensors | {"rope_freqs.weight": odd}))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"llama.expert_count": 8}, "metadata expert_used_count is None"),
    "old experts": (
        {"llama.expert_count": 8, "llama.expert_used_count": 2},
        r"of 8 experts, tensor blk\.0\.ffn_gate_exps\.weight is missing",
    ),
    "stretched": ({"llama.rope.scaling.type": "su"}, "rope scaling 'su' is not supported"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, r"metadata rope\.scaling\.factor is None"),
    "width": ({"llama.attention.key_length": 48}, "over 32 of 48 dimensions"),
    "values": ({"llama.attention.value_length": 48}, "different widths"),
    "scale": ({"llama.attention.scale": 0.5}, r"metadata attention\.scale is 0\.5, which is not supported"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_model_cannot_do_is_refused(tensors: dict[str, np.ndarray], tmp_path: Path, what: str) -> None:
    extra, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        GGUFCheckpoint(write_gguf(tmp_path / "m.gguf", tensors, extra=extra))


def test_other_architecture_and_other_tensors(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"architecture 'gptneox' is not supported; supported: \['gemma', 'gemma2', 'gemma3', 'gpt-oss', 'llama'",
    ):
        GGUFCheckpoint(write_gguf(tmp_path / "g.gguf", tensors, architecture="gptneox"))
    extra = write_gguf(tmp_path / "e.gguf", tensors | {"mystery.weight": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match=r"no place in a llama model .*mystery\.weight"):
        convert(extra, tmp_path / "out", 1, torch.float32)
    fewer = {name: tensor for name, tensor in tensors.items() if "1.mlp.up_proj" not in name}
    with pytest.raises(ValueError, match=r"missing .*model\.layers\.1\.mlp\.up_proj\.weight"):
        convert(write_gguf(tmp_path / "f.gguf", fewer), tmp_path / "out", 1, torch.float32)
    integers = write_gguf(tmp_path / "i.gguf", tensors | {"model.norm.weight": np.zeros(HIDDEN, np.int32)})
    with pytest.raises(ValueError, match=r"output_norm\.weight has the type I32"):
        GGUFCheckpoint(integers)


def test_truncated_at_every_stage(exact_file: Path, tmp_path: Path) -> None:
    data, path = exact_file.read_bytes(), tmp_path / "cut.gguf"
    for count in [*range(0, 1200, 37), 5000, len(data) // 2, len(data) - 200]:
        path.write_bytes(data[:count])
        with pytest.raises(ValueError, match=r"cut\.gguf: (damaged or truncated|not a) GGUF file"):
            GGUFHeader.read(path)
    path.write_bytes(data[:16] + struct.pack("<Q", 1 << 62) + data[24:])  # a count beyond the file
    with pytest.raises(ValueError, match="damaged or truncated"):
        GGUFHeader.read(path)
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        GGUFHeader.read(tmp_path / "none.gguf")


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(4, 3000), flip=st.integers(1, 255))
def test_altered_headers_never_hang_or_crash(exact_file: Path, tmp_path: Path, position: int, flip: int) -> None:
    data = bytearray(exact_file.read_bytes())
    data[position] ^= flip
    path = tmp_path / "altered.gguf"
    path.write_bytes(bytes(data))
    try:
        GGUFCheckpoint(path)
    except ValueError as error:
        assert "altered.gguf" in str(error) or "model config" in str(error)


def test_demo_model(tmp_path: Path) -> None:
    demo = os.environ.get("MLB_DEMO_GGUF")
    if not demo:
        pytest.skip("MLB_DEMO_GGUF does not name the demo model's GGUF file")
    reader = open_source(Path(demo))
    check_complete(reader, tensor_sources(reader.config))
    convert(Path(demo), tmp_path / "out", 2, torch.bfloat16)
    converted = open_checkpoint(tmp_path / "out")
    assert fingerprint(converted) == fingerprint(reader)
    for name in ("model.layers.7.self_attn.k_proj.weight", "model.layers.29.mlp.down_proj.weight"):
        assert torch.equal(converted.read(name), reader.read(name).bfloat16())
