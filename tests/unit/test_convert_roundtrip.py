"""convert: every value arrives bit for bit at any number of ranks, and nothing half-written is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints_conv.convert import convert
from megatron_lowbit.checkpoint.huggingface import HuggingFaceCheckpoint
from megatron_lowbit.checkpoint.open import open_checkpoint
from megatron_lowbit.checkpoint.tensor_parallel import TensorParallelCheckpoint
from megatron_lowbit.models.registry import tensor_sources


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases, odd sizes, grouped queries (6 heads share 2 key-value heads), with companions."""
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=30,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        vocab_size=101,
        max_position_embeddings=64,
        attention_bias=True,
        mlp_bias=True,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    directory = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "LICENSE.txt").write_text("free")
    (directory / "training_args.bin").write_bytes(b"not ours")
    return directory


@pytest.fixture(scope="module")
def originals(source: Path) -> dict[str, torch.Tensor]:
    return load_file(source / "model.safetensors")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that tensors are cut across blocks as large ones are."""
    monkeypatch.setattr("checkpoints_conv.row_blocks.BLOCK_NBYTES", 7 * 30 * 4)


def assert_equal(directory: Path, originals: dict[str, torch.Tensor]) -> None:
    reader = open_checkpoint(directory)
    assert reader.names() == set(originals)
    for name, tensor in originals.items():
        assert torch.equal(reader.read(name), tensor), name


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5, 9])
def test_every_value_arrives(source: Path, originals: dict[str, torch.Tensor], tmp_path: Path, tp: int) -> None:
    seen: list[tuple[int, int]] = []
    summary = convert(source, tmp_path / "out", tp, torch.float32, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    assert_equal(tmp_path / "out", originals)
    reader = TensorParallelCheckpoint(tmp_path / "out")
    reader.verify_hashes()
    assert len(summary.ranks) == tp
    for rank, row in enumerate(summary.ranks):
        shards = load_file(tmp_path / "out" / row.file)  # the library accepts what we wrote, empty shards too
        assert row.nbytes == (tmp_path / "out" / row.file).stat().st_size
        assert row.tensors == sum(shard.numel() > 0 for shard in shards.values())
        for name, entry in tensor_sources(reader.config).items():
            expected = originals[name]
            if entry.rule.dim is not None:
                start, stop = entry.rule.span(rank, tp)
                expected = expected.narrow(entry.rule.dim, start, stop - start)
            assert torch.equal(shards[name], expected), (rank, name)


def test_ranks_without_heads_hold_empty_shards(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", 9, torch.float32)
    with safe_open(tmp_path / "out" / "rank-08-of-09.safetensors", "pt") as file:
        assert file.get_slice("model.layers.0.self_attn.q_proj.weight").get_shape() == [0, 30]
        assert file.get_slice("model.layers.0.self_attn.o_proj.weight").get_shape() == [30, 0]


def test_resharding_and_reading_at_other_sizes(
    source: Path, originals: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    convert(source, tmp_path / "three", 3, torch.float32)
    convert(tmp_path / "three", tmp_path / "four", 4, torch.float32)
    convert(source, tmp_path / "direct", 4, torch.float32)
    assert_equal(tmp_path / "four", originals)
    for rank in range(4):
        name = f"rank-{rank:02d}-of-04.safetensors"
        assert (tmp_path / "four" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    for stored in ("three", "four"):
        for size in (1, 2, 3, 4, 5, 7):
            for rank in range(size):
                assert_rank_loads(TensorParallelCheckpoint(tmp_path / stored), originals, rank, size)


def assert_rank_loads(
    reader: TensorParallelCheckpoint, originals: dict[str, torch.Tensor], rank: int, size: int
) -> None:
    """All spans of a rank, from the files it says it needs and no others."""
    files = reader.files_for_rank(rank, size)
    for file in files:
        reader.verify_file(file)
    for index, stored in enumerate(reader._rank_files):
        if stored.path.name not in files:
            reader._rank_files[index] = None  # type: ignore[call-overload]
    for name, entry in tensor_sources(reader.config).items():
        if entry.rule.dim is None:
            assert torch.equal(reader.read_span(name, 0, 0, entry.shape[0]), originals[name])
        else:
            start, stop = entry.rule.span(rank, size)
            span = reader.read_span(name, entry.rule.dim, start, stop)
            assert torch.equal(span, originals[name].narrow(entry.rule.dim, start, stop - start)), (rank, size, name)


def test_spans_across_the_cut(source: Path, originals: dict[str, torch.Tensor], tmp_path: Path) -> None:
    convert(source, tmp_path / "out", 3, torch.float32)
    reader = TensorParallelCheckpoint(tmp_path / "out")
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.gate_proj.weight"):
        for dim in (0, 1):
            for start, stop in ((0, 5), (4, 29), (13, 13)):
                expected = originals[name].narrow(dim, start, stop - start)
                assert torch.equal(reader.read_span(name, dim, start, stop), expected)


def test_bfloat16_rounds_to_nearest_even(source: Path, originals: dict[str, torch.Tensor], tmp_path: Path) -> None:
    convert(source, tmp_path / "half", 2, torch.bfloat16)
    assert_equal(tmp_path / "half", {name: tensor.bfloat16() for name, tensor in originals.items()})
    convert(tmp_path / "half", tmp_path / "full", 1, torch.float32)
    assert_equal(tmp_path / "full", {name: tensor.bfloat16().float() for name, tensor in originals.items()})


def test_companions_are_copied_and_recorded(source: Path, tmp_path: Path) -> None:
    summary = convert(source, tmp_path / "out", 2, torch.float32)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    ranks = {row.file for row in summary.ranks}
    others = {"config.json", "huggingface_config.json", "tokenizer.json", "generation_config.json", "LICENSE.txt"}
    assert names == {"manifest.json"} | ranks | others
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert set(manifest["files"]) == ranks | others and manifest["source"] == "model"
    (tmp_path / "out" / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer\.json: SHA-256"):
        TensorParallelCheckpoint(tmp_path / "out").verify_hashes()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("replace", [False, True])
def test_interruption_leaves_nothing(
    source: Path, tmp_path: Path, interruption: type[BaseException], replace: bool
) -> None:
    if replace:
        convert(source, tmp_path / "out", 2, torch.float32)

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise interruption

    with pytest.raises(interruption):
        convert(source, tmp_path / "out", 3, torch.float32, interrupt, overwrite=True)
    if replace:
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert TensorParallelCheckpoint(tmp_path / "out").tp == 2
    else:
        assert not list(tmp_path.iterdir())


def test_folder_of_a_killed_run_does_not_load(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoints_conv.staging.shutil.rmtree", lambda path, ignore_errors: None)

    def interrupt(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", 1, torch.float32, interrupt)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json: no such file .* cut off"):
        open_checkpoint(left)


def test_overwriting(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    convert(source, out, 2, torch.float32)  # an empty folder is as good as none
    with pytest.raises(ValueError, match="is there already"):
        convert(source, out, 3, torch.float32)
    convert(source, out, 3, torch.float32, overwrite=True)
    assert TensorParallelCheckpoint(out).tp == 3
    assert not list(out.glob("*of-02*")) and [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex is not part of the checkpoint"):
        convert(source, out, 2, torch.float32, overwrite=True)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "a").write_text("")
    with pytest.raises(ValueError, match="not empty and not a converted checkpoint"):
        convert(source, precious, 2, torch.float32, overwrite=True)


def test_refused_arguments(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "file").write_text("")
    refusals = [
        ((source, out, 0, torch.float32), "size is 0; it must lie between 1 and 512"),
        ((source, out, 2, torch.float64), "supported: bfloat16, float32, float16"),
        ((source, source, 2, torch.float32), "lie inside each other"),
        ((source, source / "tp2", 2, torch.float32), "lie inside each other"),
        ((source, source.parent, 2, torch.float32), "lie inside each other"),
        ((source, tmp_path / "file", 2, torch.float32), "a file is there"),
        ((source, tmp_path / "file" / "out", 2, torch.float32), "not a folder"),
    ]
    for arguments, message in refusals:
        with pytest.raises(ValueError, match=message):
            convert(*arguments)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        convert(tmp_path / "nowhere", out, 2, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_full_disk_is_seen_before_the_work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("checkpoints_conv.convert.shutil.disk_usage", lambda path: Usage)
    with pytest.raises(ValueError, match="1,000 are free"):
        convert(source, tmp_path / "out", 2, torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.4e38])
def test_weights_must_be_finite(source: Path, originals: dict[str, torch.Tensor], tmp_path: Path, bad: float) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_bytes((source / "config.json").read_bytes())
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {key: tensor.clone() for key, tensor in originals.items()}
    tensors[name][36, 29] = bad
    save_file(tensors, copy / "model.safetensors")
    after = "after conversion" if bad == 3.4e38 else "values that are NaN or infinite;"
    with pytest.raises(ValueError, match=rf"{name} holds 1 .*{after}"):
        convert(copy, tmp_path / "out", 2, torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_damaged_source_is_not_resharded(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "two", 2, torch.float32)
    victim = tmp_path / "two" / "rank-01-of-02.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 0x10
    victim.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="altered or damaged"):
        convert(tmp_path / "two", tmp_path / "three", 3, torch.float32)


def test_incomplete_source(source: Path, originals: dict[str, torch.Tensor], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file({name: tensor for name, tensor in originals.items() if "norm" not in name}, copy / "model.safetensors")
    assert HuggingFaceCheckpoint(copy).names() < set(originals)
    with pytest.raises(ValueError, match="5 of 35 tensors are missing"):
        convert(copy, tmp_path / "out", 2, torch.float32)
