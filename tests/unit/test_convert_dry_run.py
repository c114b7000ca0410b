"""What a dry run says: published sizes of real models, and to the byte what `convert` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stored_checkpoints import hf_config, write_checkpoint

from checkpoints_conv.convert import convert
from checkpoints_conv.dry_run import dry_run
from lowbit_tools.cli import main
from megatron_lowbit.models.registry import config_from_hf


def shapes(kind: str, hidden: int, ffn: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any) -> dict:
    return dict(
        model_type=kind, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, max_position_embeddings=4096, **more,
    )  # fmt: skip


# parameters as the model cards and the headers of the published safetensors files have them
PUBLISHED = {
    "Llama 2 13B": (13_015_864_320, shapes("llama", 5120, 13824, 40, 40, 40, 32000)),
    "Llama 2 70B": (68_976_648_192, shapes("llama", 8192, 28672, 80, 64, 8, 32000)),
    "Llama 3.1 405B": (405_853_388_800, shapes("llama", 16384, 53248, 126, 128, 8, 128256)),
    "Mistral 7B": (7_241_732_096, shapes("mistral", 4096, 14336, 32, 32, 8, 32000)),
    "Mistral NeMo": (12_247_782_400, shapes("mistral", 5120, 14336, 40, 32, 8, 131072, head_dim=128)),
    "Mixtral 8x7B": (
        46_702_792_704,
        shapes("mixtral", 4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2),
    ),
    "Gemma 2 27B": (
        27_227_128_320,
        shapes("gemma2", 4608, 36864, 46, 32, 16, 256000, head_dim=128, query_pre_attn_scalar=144),
    ),
    "Gemma 3 270M": (268_098_176, shapes("gemma3_text", 640, 2048, 18, 4, 1, 262144, head_dim=256)),
    "Qwen2.5 7B": (7_615_616_512, shapes("qwen2", 3584, 18944, 28, 28, 4, 152064)),
    "Qwen3 32B": (32_762_123_264, shapes("qwen3", 5120, 25600, 64, 64, 8, 151936, head_dim=128)),
    "Phi-4": (14_659_507_200, shapes("phi3", 5120, 17920, 40, 40, 10, 100352)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    parameters, hf = PUBLISHED[name]
    config = config_from_hf(hf, name)
    plan = dry_run(config, 7, torch.bfloat16)
    assert plan.parameters == parameters
    # every rank's file holds its shards and a header; what two ranks hold makes the whole larger than the model
    for rank in plan.ranks:
        shards = sum(tensor.nbytes for tensor in plan.tensors if tensor.rank == rank.rank)
        assert 0 < rank.nbytes - shards < 40_000_000
    assert sum(tensor.nbytes for tensor in dry_run(config, 1, torch.bfloat16).tensors) == 2 * parameters


@pytest.mark.parametrize("tp", [1, 5, 9])
def test_the_command_says_what_convert_writes(tmp_path: Path, tp: int, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "hf", hf_config("gemma2"))
    for source in (tmp_path / "hf", tmp_path / "hf" / "config.json"):
        assert main(["convert", str(source), "--dry-run", "--tp", str(tp), "--json", str(tmp_path / "plan.json")]) == 0
        assert "nothing was written" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "plan.json"}
    plan = json.loads((tmp_path / "plan.json").read_text())
    summary = convert(tmp_path / "hf", tmp_path / "out", tp, torch.bfloat16)
    assert plan["conditions"]["nbytes"] == summary.nbytes
    for rank in summary.ranks:
        assert rank.nbytes == (tmp_path / "out" / rank.file).stat().st_size
        rows = [row for row in plan["rows"] if row["rank"] == rank.rank]
        assert sum(row["nbytes"] > 0 for row in rows) == rank.tensors


def test_an_impossible_size() -> None:
    config = config_from_hf(hf_config("llama"), "test")
    for tp in (0, 513):
        with pytest.raises(ValueError, match=f"tensor-parallel size is {tp}; it must lie between 1 and 512"):
            dry_run(config, tp, torch.bfloat16)
