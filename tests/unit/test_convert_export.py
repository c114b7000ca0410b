"""export, reshard and verify: what transformers loads, what is refused, and what a damaged checkpoint is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fuzz.fuzz_readers import write_gguf
from helpers.stored_checkpoints import hf_config, write_checkpoint
from safetensors.torch import load_file, save_file

from checkpoints_conv.convert import convert
from checkpoints_conv.export import export
from checkpoints_conv.reshard import reshard
from checkpoints_conv.source import open_source
from checkpoints_conv.verify import verify
from lowbit_tools.cli import main
from megatron_lowbit.checkpoint.open import open_checkpoint

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Weights of a size that a forward pass survives, with a tokenizer's files beside them."""
    directory = tmp_path / "hf"
    write_checkpoint(directory, hf_config("llama"))
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: (torch.randn(tensor.shape, generator=generator) / 2 + ("norm" in name)).bfloat16()
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    save_file(tensors, directory / "model.safetensors")
    for name in ("tokenizer.json", "generation_config.json"):
        (directory / name).write_text('{"eos_token_id": 7}' if name.startswith("gen") else "{}")
    (directory / "LICENSE.txt").write_text("free")
    return directory


def test_shards_and_companions(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "tp3", 3, None)
    seen: list[tuple[int, int]] = []
    summary = export(tmp_path / "tp3", tmp_path / "out", 2000, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    original = load_file(source / "model.safetensors")
    assert set(index["weight_map"]) == set(original) and len(set(index["weight_map"].values())) >= 3
    assert index["metadata"]["total_size"] == 2 * sum(tensor.numel() for tensor in original.values())
    for name, file in index["weight_map"].items():
        shard = load_file(tmp_path / "out" / file)
        assert torch.equal(shard[name], original[name])
        assert sum(2 * tensor.numel() for tensor in shard.values()) <= 2000 or len(shard) == 1
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {file.file for file in summary.files} | set(summary.other_files)
    assert written >= {"config.json", "tokenizer.json", "generation_config.json", "LICENSE.txt"}
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(source).config


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "mixtral", "qwen3"])
def test_transformers_loads_it(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    tensors = write_checkpoint(tmp_path / "hf", hf_config(family))
    convert(tmp_path / "hf", tmp_path / "tp3", 3, None)
    export(tmp_path / "tp3", tmp_path / "out", 2000)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.bfloat16
    state = model.state_dict()
    common = set(state) & set(tensors)
    assert len(common) > 8 and all(torch.equal(state[name], tensors[name]) for name in common)


def test_export_refuses(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "tp2", 2, None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    for out, size, message in (
        (tmp_path / "full", 5, "the folder is not empty"),
        (tmp_path / "tp2", 5, "lie inside each other"),
        (tmp_path / "tp2" / "out", 5, "lie inside each other"),
        (tmp_path / "new", 0, "it must have at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            export(tmp_path / "tp2", out, size)
    victim = tmp_path / "tp2" / "rank-01-of-02.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ValueError, match="altered or damaged"):
        export(tmp_path / "tp2", tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "tp2", "full"}


def test_reshard_takes_our_checkpoints_only(source: Path, tmp_path: Path) -> None:
    for path in (source, source / "model.safetensors"):
        with pytest.raises(ValueError, match="convert takes others"):
            reshard(path, tmp_path / "out", 2)
    convert(source, tmp_path / "tp5", 5, None)
    assert main(["reshard", str(tmp_path / "tp5"), str(tmp_path / "tp7"), "--tp", "7"]) == 0
    convert(source, tmp_path / "direct", 7, None)
    for path in (tmp_path / "direct").glob("rank-*"):
        assert path.read_bytes() == (tmp_path / "tp7" / path.name).read_bytes()
    assert (tmp_path / "tp7" / "huggingface_config.json").read_bytes() == (
        tmp_path / "direct" / "huggingface_config.json"
    ).read_bytes()


def test_verify(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(source, tmp_path / "tp3", 3, None)
    found = verify(tmp_path / "tp3")
    assert found.hashed_files == 3 + 5 and found.compared_tensors is None
    words = ["verify", str(tmp_path / "tp3"), "--against", str(source), "--logits", "--json", str(tmp_path / "v.json")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "equal those of" in said and "FP32 logits" in said
    (row,) = json.loads((tmp_path / "v.json").read_text())["rows"]
    assert row["compared_tensors"] == row["tensors"] and 0 <= row["logit_difference"] < 1e-4 * row["largest_logit"]
    assert verify(tmp_path / "tp3", logits=True).logit_difference < 1e-4  # by way of an export
    # weights of another model: every sum is right, and they are not the ones
    tensors = load_file(source / "model.safetensors")
    tensors[Q_PROJ][5, 2] += 1
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=rf"1 values of tensor {Q_PROJ} from row 0 on differ"):
        verify(tmp_path / "tp3", source)
    with pytest.raises(ValueError, match="not a Hugging Face folder"):
        verify(tmp_path / "tp3", tmp_path / "tp3", logits=True)


def test_verify_finds_wrong_logits(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, tmp_path / "tp3", 3, None)
    # as a config would that names another rotary embedding: all values are right, what is computed is not
    (source / "config.json").write_text(json.dumps(hf_config("llama", rope_theta=3.0)))
    monkeypatch.setattr("checkpoints_conv.verify._compare", lambda *arguments: 0)
    with pytest.raises(ValueError, match=r"logits differ from transformers' by up to"):
        verify(tmp_path / "tp3", source, logits=True)


@pytest.mark.parametrize("kind", ["hf", "tp"])
def test_verify_of_damage(source: Path, tmp_path: Path, kind: str) -> None:
    convert(source, tmp_path / "tp2", 2, None)
    victim = source / "model.safetensors" if kind == "hf" else tmp_path / "tp2" / "rank-00-of-02.safetensors"
    data = bytearray(victim.read_bytes())
    victim.write_bytes(data[:-2] if kind == "hf" else bytes([*data[:-2], data[-2] ^ 1, data[-1]]))
    with pytest.raises(ValueError, match="damaged"):
        verify(source if kind == "hf" else tmp_path / "tp2")


def test_a_gguf_file_becomes_a_hugging_face_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It brings no config.json: one is written, and says the same."""
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr("checkpoints_conv.companions.write_tokenizer", lambda path, directory: [])
    convert(tmp_path / "m.gguf", tmp_path / "tp3", 3, torch.float32)
    export(tmp_path / "tp3", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").config == open_source(tmp_path / "m.gguf").config
    assert verify(tmp_path / "out", tmp_path / "m.gguf").compared_tensors == 12
