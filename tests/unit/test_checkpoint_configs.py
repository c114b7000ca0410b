"""Configs and manifests that contradict themselves or the weights, or would keep the program busy for ever."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.stored_checkpoints import hf_config, write_checkpoint

from checkpoints_conv.convert import convert
from megatron_lowbit.checkpoint.open import open_checkpoint


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", hf_config("llama"), shards=3)
    return tmp_path / "model"


@pytest.fixture
def converted(sharded: Path, tmp_path: Path) -> Path:
    convert(sharded, tmp_path / "tp3", 3, None)
    return tmp_path / "tp3"


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


CONFIG_EDITS: dict[str, tuple[dict, str]] = {
    "endless layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, at most"),
    "negative layers": ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    "more layers than tensors": ({"num_hidden_layers": 50}, "50 layers in its config.json but 35 tensors"),
    "a list of heads": ({"num_attention_heads": [6]}, r"config\.json"),
    "a nested token": ({"eos_token_id": [[2]]}, "eos_token_id is"),
    "no table of rope": ({"rope_scaling": 3, "rope_parameters": 3}, r"config\.json"),
}


@pytest.mark.parametrize("what", CONFIG_EDITS)
def test_a_config_that_makes_no_sense(sharded: Path, what: str) -> None:
    change, message = CONFIG_EDITS[what]
    edit_json(sharded / "config.json", lambda config: config.update(change))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(sharded)


CONVERTED_CONFIG_EDITS: dict[str, tuple[dict, str]] = {
    "a word": ({"hidden_size": "30"}, r"hidden_size is 30, expected int"),
    "a fraction": ({"num_heads": 6.5}, r"num_heads is 6\.5, expected int"),
    "not finite": ({"rope_theta": float("inf")}, r"rope_theta is inf, expected float"),
    "endless layers": ({"num_layers": 10**9}, "1000000000 layers and 0 experts; at most"),
    "a number for a table": ({"rope_scaling": 3}, r"rope_scaling is 3, expected RopeScaling"),
    "endless experts": (
        {"moe": {"num_experts": 10**9, "experts_per_token": 2, "intermediate_size": 3}}, "1000000000 experts; at most",
    ),
    "a table of something else": ({"moe": {"experts": 3}}, "moe is .*, expected MoEConfig"),
}  # fmt: skip


@pytest.mark.parametrize("what", CONVERTED_CONFIG_EDITS)
def test_a_converted_config_that_makes_no_sense(converted: Path, what: str) -> None:
    """Its sum is right: somebody wrote it so."""
    change, message = CONVERTED_CONFIG_EDITS[what]
    path = converted / "config.json"
    edit_json(path, lambda config: config.update(change))
    record = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "nbytes": path.stat().st_size}
    edit_json(converted / "manifest.json", lambda manifest: manifest["files"].update({path.name: record}))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(converted)


MANIFEST_EDITS: dict[str, tuple[Callable[[dict], object], str]] = {
    "later version": (lambda m: m.update(version=2), "format version 2, this release reads 1"),
    "other format": (lambda m: m.update(format="zip"), "format is 'zip'"),
    "path trick": (lambda m: m["files"].update({"../x": m["files"]["config.json"]}), "not a plain file name"),
    "the folder above": (lambda m: m["files"].update({"..": m["files"]["config.json"]}), "not a plain file name"),
    "ranks without end": (lambda m: m.update(tp=10**9), "missing or invalid"),
    "a list for a type": (lambda m: m.update(dtype=["bfloat16"]), "missing or invalid"),
    "no ranks": (lambda m: m.update(tp=0), "missing or invalid"),
    "odd dtype": (lambda m: m.update(dtype="int8"), "missing or invalid"),
    "more ranks": (lambda m: m.update(tp=4), "does not list rank-00-of-04"),
    "bad sum": (lambda m: m["files"]["config.json"].update(sha256="x"), "lacks a valid sha256"),
}


@pytest.mark.parametrize("what", MANIFEST_EDITS)
def test_invalid_manifest(converted: Path, what: str) -> None:
    change, message = MANIFEST_EDITS[what]
    edit_json(converted / "manifest.json", change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(converted)
