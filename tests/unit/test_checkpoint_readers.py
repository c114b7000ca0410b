"""Checkpoint readers: what they return, and what they say about damaged, incomplete or foreign files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints_conv.convert import convert
from megatron_lowbit.checkpoint.fingerprint import fingerprint
from megatron_lowbit.checkpoint.huggingface import HuggingFaceCheckpoint
from megatron_lowbit.checkpoint.open import open_checkpoint
from megatron_lowbit.checkpoint.reader import check_complete
from megatron_lowbit.checkpoint.tensor_parallel import TensorParallelCheckpoint
from megatron_lowbit.models.registry import tensor_sources

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def save_llama(directory: Path, dtype: torch.dtype = torch.float32, tie: bool = False, shard: str = "1GB") -> Path:
    """A random Llama with odd sizes and grouped queries: 6 heads share 2 key-value heads."""
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=30, intermediate_size=37, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        head_dim=10, vocab_size=101, max_position_embeddings=64, tie_word_embeddings=tie, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.1)
    model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("hf") / "model", shard="20KB")


@pytest.fixture
def sharded(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the sharded checkpoint that a test may damage."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in pristine.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def converted(sharded: Path, tmp_path: Path) -> Path:
    convert(sharded, tmp_path / "tp3", 3, torch.float32)
    return tmp_path / "tp3"


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrites the checkpoint as a single file after `change`."""
    tensors = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def check(directory: Path) -> None:
    reader = open_checkpoint(directory)
    check_complete(reader, tensor_sources(reader.config))


def test_reads_a_sharded_checkpoint(pristine: Path) -> None:
    reader = HuggingFaceCheckpoint(pristine)
    assert len(list(pristine.glob("model-*.safetensors"))) > 2
    check(pristine)
    assert reader.config.eos_token_ids == (2, 5)
    for path in pristine.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(reader.read(name), tensor)
            assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == torch.float32


@pytest.mark.parametrize(
    ("dim", "start", "stop"), [(0, 0, 60), (0, 7, 41), (0, 9, 9), (1, 0, 30), (1, 3, 4), (1, 5, 29)]
)
def test_spans_equal_slices(pristine: Path, dim: int, start: int, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lowbit.checkpoint.tensor_file.ROW_BLOCK_NBYTES", 7 * 30 * 4)
    reader = HuggingFaceCheckpoint(pristine)
    span = reader.read_span(Q_PROJ, dim, start, stop)
    assert span.is_contiguous() and torch.equal(span, reader.read(Q_PROJ).narrow(dim, start, stop - start))


def test_impossible_span_and_unknown_name(pristine: Path) -> None:
    reader = HuggingFaceCheckpoint(pristine)
    with pytest.raises(ValueError, match=r"has no span \[3, 61\)"):
        reader.read_span(Q_PROJ, 0, 3, 61)
    with pytest.raises(ValueError, match="there is no tensor nonsense"):
        reader.read("nonsense")


def test_tied_head_and_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    directory = save_llama(tmp_path / "tied", tie=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)

    edit_tensors(directory, add)
    check(directory)
    assert "lm_head.weight" not in open_checkpoint(directory).names()


def test_missing_extra_and_misshapen_tensors(sharded: Path) -> None:
    edit_tensors(sharded, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(ValueError, match=rf"1 of 21 tensors are missing .*{Q_PROJ} with shape \(60, 30\)"):
        check(sharded)
    edit_tensors(sharded, lambda tensors: tensors.update({Q_PROJ: torch.zeros(30, 60)}))
    with pytest.raises(ValueError, match=rf"{Q_PROJ} has shape \(30, 60\), expected \(60, 30\)"):
        check(sharded)
    edit_tensors(sharded, lambda tensors: tensors.update({Q_PROJ: torch.zeros(60, 30), "model.extra": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"no place in a llama model .*model\.extra"):
        check(sharded)


def test_integer_weights_are_refused(sharded: Path) -> None:
    edit_tensors(sharded, lambda tensors: tensors.update({Q_PROJ: torch.zeros(60, 30, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=r"stored as torch\.int8"):
        check(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, "weights.bin"])
def test_index_may_only_name_files_in_the_folder(sharded: Path, name: object) -> None:
    (sharded.parent / "model.safetensors").write_bytes(b"outside")
    edit_json(sharded / "model.safetensors.index.json", lambda index: index["weight_map"].update({Q_PROJ: name}))
    with pytest.raises(ValueError, match=r"index\.json: .* is not a plain \.safetensors file name"):
        open_checkpoint(sharded)


def test_symbolic_links_as_in_the_hub_cache(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in sharded.iterdir():
        (snapshot / path.name).symlink_to(path)
    check(snapshot)


def test_index_without_its_file_or_tensor(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    first = sorted(sharded.glob("model-*.safetensors"))[0]
    edit_json(index, lambda data: data["weight_map"].update({"model.ghost": first.name}))
    with pytest.raises(ValueError, match=rf"model\.ghost is not in {first.name}"):
        open_checkpoint(sharded)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=first.name):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards_and_a_name_twice(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    tensors = load_file(second)
    name = min(tensors)
    save_file({**load_file(first), name: tensors[name]}, first)
    with pytest.raises(ValueError, match=rf"{name} is in {second.name} and in {first.name}; which one is right"):
        open_checkpoint(sharded)
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"weight_map": {', f'"weight_map": {{"{name}": "{first.name}",', 1))
    with pytest.raises(ValueError, match=rf"index\.json: not valid JSON \(the key '{name}' stands there twice"):
        open_checkpoint(sharded)


def test_truncated_weights(sharded: Path) -> None:
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-4])
    with pytest.raises(ValueError, match=rf"{victim.name}: damaged or truncated .* its header describes"):
        open_checkpoint(sharded)


def test_legacy_and_quantised_and_unknown_models(sharded: Path) -> None:
    edit_json(sharded / "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq"}))
    with pytest.raises(ValueError, match=r"quantised \('gptq'\)"):
        open_checkpoint(sharded)
    (sharded / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    edit_json(sharded / "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is '</s>'"):
        open_checkpoint(sharded)
    (sharded / "generation_config.json").unlink()
    for path in sharded.glob("*safetensors*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        open_checkpoint(sharded)
    (sharded / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a file of plain weights: it is no archive"):
        open_checkpoint(sharded)
    edit_json(sharded / "config.json", lambda config: config.update(model_type="gpt2"))
    with pytest.raises(ValueError, match="'gpt2' is not supported"):
        open_checkpoint(sharded)
    (sharded / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        open_checkpoint(sharded)


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="the folder is empty"):
        open_checkpoint(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF....")
    for path in (tmp_path, tmp_path / "m.gguf"):
        with pytest.raises(ValueError, match="convert it first: megatron-lowbit convert"):
            open_checkpoint(path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="expected the folder"):
        open_checkpoint(tmp_path / "notes.txt")


def test_damage_to_a_converted_checkpoint(converted: Path) -> None:
    rank_file = converted / "rank-01-of-03.safetensors"
    data, size = rank_file.read_bytes(), rank_file.stat().st_size
    rank_file.write_bytes(data[:-10])
    with pytest.raises(ValueError, match=rf"rank-01-of-03\.safetensors: {size - 10} bytes, expected {size}"):
        open_checkpoint(converted)
    rank_file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    reader = TensorParallelCheckpoint(converted)
    reader.verify_file("rank-00-of-03.safetensors")
    for verify in (lambda: reader.verify_file(rank_file.name), reader.verify_hashes):
        with pytest.raises(ValueError, match=r"rank-01-of-03\.safetensors: SHA-256 is .* altered or damaged"):
            verify()
    rank_file.unlink()
    with pytest.raises(FileNotFoundError, match="rank-01-of-03"):
        open_checkpoint(converted)


def test_rank_file_of_another_rank(converted: Path) -> None:
    first, last = converted / "rank-00-of-03.safetensors", converted / "rank-02-of-03.safetensors"
    data = first.read_bytes()
    last.write_bytes(data)
    record = json.loads((converted / "manifest.json").read_text())["files"][first.name]
    edit_json(converted / "manifest.json", lambda manifest: manifest["files"].update({last.name: record}))
    with pytest.raises(ValueError, match=r"rank-02-of-03.* expected .* for rank 2 of 3"):
        open_checkpoint(converted)


def test_altered_config_is_found_at_opening(converted: Path) -> None:
    path = converted / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    with pytest.raises(ValueError, match=r"config\.json: SHA-256"):
        open_checkpoint(converted)


def test_fingerprint_survives_conversion_and_tells_models_apart(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "bf16", torch.bfloat16)
    convert(source, tmp_path / "a", 2, torch.float32)
    convert(tmp_path / "a", tmp_path / "b", 5, torch.bfloat16)
    prints = {fingerprint(open_checkpoint(path)) for path in (source, tmp_path / "a", tmp_path / "b")}
    assert len(prints) == 1
    other = save_llama(tmp_path / "other", torch.bfloat16)
    edit_tensors(other, lambda tensors: tensors["model.norm.weight"][3].add_(0.5))
    assert fingerprint(open_checkpoint(other)) not in prints
