"""Every family there and back: Hugging Face -> 3 ranks -> 4 ranks -> Hugging Face, bit for bit, merged tensors too."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stored_checkpoints import FAMILIES, hf_config, stored_tensors, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoints_conv.convert import convert
from checkpoints_conv.dry_run import dry_run
from checkpoints_conv.export import export
from checkpoints_conv.hf_config import config_to_hf
from checkpoints_conv.reshard import reshard
from megatron_lowbit.checkpoint.open import open_checkpoint
from megatron_lowbit.checkpoint.reader import check_complete
from megatron_lowbit.models import registry
from megatron_lowbit.models.registry import config_from_hf, tensor_sources

KNOWN = sorted(set(FAMILIES) & set(registry.FAMILIES))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def equal_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Zeros of both signs apart, which torch.equal takes for equal."""
    return first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def test_every_family_is_here() -> None:
    assert set(registry.FAMILIES) == set(KNOWN), "add it to helpers/stored_checkpoints.py"


@pytest.mark.parametrize("family", KNOWN)
@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_there_and_back(family: str, data: st.DataObject) -> None:
    kv_heads, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    sizes: dict[str, Any] = dict(
        hidden_size=data.draw(st.integers(1, 20)),
        intermediate_size=data.draw(st.integers(1, 20)),
        vocab_size=data.draw(st.integers(3, 20)),
        head_dim=2 * data.draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * groups,
    )
    if family == "phi3":
        sizes["hidden_size"] = sizes["head_dim"] * sizes["num_attention_heads"]
    dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    kind, shards = data.draw(st.sampled_from(["safetensors", "bin"])), data.draw(st.integers(1, 3))
    hf = hf_config(family, **sizes)
    config = config_from_hf(dict(hf), "test")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = write_checkpoint(folder / "hf", hf, dtype, shards, kind=kind)
        converted = convert(folder / "hf", folder / "tp3", 3, None)
        assert not converted.notes and converted.ranks == dry_run(config, 3, dtype).ranks
        reshard(folder / "tp3", folder / "tp4", 4)
        summary = export(folder / "tp4", folder / "back", max_shard_nbytes=data.draw(st.sampled_from([1, 500, 10**9])))
        back = {
            name: tensor for file in summary.files for name, tensor in load_file(folder / "back" / file.file).items()
        }
        expected = stored_tensors(config, tensors)
        assert set(back) == set(expected)
        for name, tensor in expected.items():
            assert equal_bits(back[name], tensor), name
        written = json.loads((folder / "back" / "config.json").read_text())
        assert config_from_hf(written, "back") == config
        assert {key: written[key] for key in hf} == hf and written["torch_dtype"] in str(dtype)
        reader = open_checkpoint(folder / "back")
        check_complete(reader, tensor_sources(config))
        for name, tensor in tensors.items():
            assert equal_bits(reader.read(name), tensor), name


@pytest.mark.parametrize("family", KNOWN)
def test_spans_of_merged_tensors(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lowbit.checkpoint.tensor_file.ROW_BLOCK_NBYTES", 64)
    monkeypatch.setattr("megatron_lowbit.checkpoint.stored_view.ROW_BLOCK_NBYTES", 64)
    tensors = write_checkpoint(tmp_path / "hf", hf_config(family), shards=2)
    reader = open_checkpoint(tmp_path / "hf")
    assert reader.names() == set(tensors)
    for name, tensor in tensors.items():
        assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == tensor.dtype
        for dim, extent in enumerate(tensor.shape):
            for start, stop in ((0, extent), (extent // 3, extent // 2 + 1), (extent, extent)):
                span = reader.read_span(name, dim, start, stop)
                assert span.is_contiguous() and equal_bits(span, tensor.narrow(dim, start, stop - start)), name
                span.zero_()  # belongs to the caller
        assert equal_bits(reader.read(name), tensor)


@pytest.mark.parametrize("family", KNOWN)
def test_a_config_is_written_from_ours(family: str) -> None:
    """For sources that have none, such as GGUF files: read again it says the same."""
    for changes in (dict(), dict(tie_word_embeddings=True, eos_token_id=[2, 5])):
        config = config_from_hf(hf_config(family, **changes), "test")
        again = config_from_hf(config_to_hf(config), "again")
        assert again == config


def test_a_config_that_cannot_say_it_is_refused() -> None:
    config = config_from_hf(hf_config("llama"), "test")
    odd = type(config)(**{**config.__dict__, "qk_norm": True})
    with pytest.raises(ValueError, match="cannot say what qk_norm is"):
        config_to_hf(odd)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_language_model_of_one_that_sees(tmp_path: Path, prefix: str) -> None:
    text = hf_config("gemma3", tie_word_embeddings=False)
    tensors = write_checkpoint(tmp_path / "plain", text)
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}}
    wrapped = tmp_path / "wrapped"
    wrapped.mkdir()
    (wrapped / "config.json").write_text(json.dumps(outer))
    head = "language_model.lm_head.weight" if prefix.startswith("language") else "lm_head.weight"
    renamed = {
        head if name == "lm_head.weight" else prefix + name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
    }
    seeing = {"vision_tower.layer.weight": torch.ones(3), "multi_modal_projector.weight": torch.ones(2)}
    torch.save({**renamed, **seeing}, wrapped / "pytorch_model.bin")
    summary = convert(wrapped, tmp_path / "tp2", 2, None)
    assert summary.notes == (
        "2 tensors that are not of the language model were left out (multi_modal_projector, vision_tower)",
    )
    export(tmp_path / "tp2", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(tensors) and all(equal_bits(back[name], tensor) for name, tensor in tensors.items())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["model_type"] == "gemma3_text" and config_from_hf(written, "x") == open_checkpoint(wrapped).config
    torch.save({**renamed, **seeing, "model.norm.weight": torch.ones(12)}, wrapped / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"and another tensor are both model\.norm\.weight"):
        open_checkpoint(wrapped)


def test_merged_tensors_are_checked_by_the_name_they_are_stored_under(tmp_path: Path) -> None:
    directory = tmp_path / "hf"
    write_checkpoint(directory, hf_config("phi3", hidden_size=24), kind="bin")
    stored = torch.load(directory / "pytorch_model.bin", weights_only=True)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    for change, message in (
        ({name: stored[name][:-1].clone()}, rf"{name} has shape \(39, 24\), expected \(40, 24\)"),
        (
            {"model.layers.1.mlp.up_proj.weight": torch.ones(2)},
            r"no place .*up_proj.* expected in .*gate_up_proj",
        ),
    ):
        torch.save({**stored, **change}, directory / "pytorch_model.bin")
        with pytest.raises(ValueError, match=message):
            reader = open_checkpoint(directory)
            check_complete(reader, tensor_sources(reader.config))
    del stored[name]
    torch.save(stored, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"1 of 4 merged tensors are missing \({name}\); .* shape \(40, 24\)"):
        open_checkpoint(directory)
