"""Stored types: kept or rounded as asked, said so, checked on their bits, and loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.stored_checkpoints import hf_config, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoints_conv.convert import convert
from checkpoints_conv.export import export
from checkpoints_conv.row_blocks import all_finite
from megatron_lowbit import ParallelContext, load_weights
from megatron_lowbit.checkpoint.open import open_checkpoint

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_is_seen_from_the_bits(dtype: torch.dtype) -> None:
    """All 65,536 patterns of 16 bits; of 32 those around every change of exponent."""
    if dtype.itemsize == 2:
        values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        edges = torch.arange(-256, 256, dtype=torch.int64)[:, None] * (1 << 23) + torch.arange(-2, 3)
        values = edges.flatten().clamp(-(1 << 31), (1 << 31) - 1).to(torch.int32).view(dtype)
    finite = values.isfinite()
    assert all_finite(values[finite]) and int(finite.sum()) > 1000
    for bad in values[~finite][:: 7 if dtype.itemsize == 2 else 1]:
        assert not all_finite(bad[None])
    assert all_finite(values[:0])


@given(st.integers(0, 99), st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.sampled_from(DTYPES))
def test_one_bad_value_anywhere(place: int, bad: float, dtype: torch.dtype) -> None:
    values = torch.randn(100).to(dtype)
    assert all_finite(values)
    values[place] = bad
    assert not all_finite(values) and not all_finite(-values)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", [None, *DTYPES])
def test_every_type_into_every_other(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype | None) -> None:
    write_checkpoint(tmp_path / "hf", hf_config("llama"), stored)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for name in tensors:  # what every type can hold, in part with more bits than it has
        tensors[name] = torch.randn(tensors[name].shape).to(stored)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    summary = convert(tmp_path / "hf", tmp_path / "out", 3, wanted)
    reader = open_checkpoint(tmp_path / "out")
    expected = stored if wanted is None else wanted
    assert summary.dtype == str(expected).removeprefix("torch.")
    for name, tensor in tensors.items():
        assert reader.dtype(name) == expected and torch.equal(reader.read(name), tensor.to(expected))
    said = " ".join(summary.notes)
    mantissa = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
    assert ("mantissa bits are left" in said) == (mantissa[stored] > mantissa[expected])
    if (stored, expected) == (torch.float16, torch.bfloat16):
        assert "fp16 -> bf16: 7 of 10 mantissa bits are left" in said and "--dtype fp16 keeps" in said
    assert ("the smallest become 0" in said) == (expected == torch.float16 != stored)
    # loading computes in bf16 unless the checkpoint is FP32 or something else is asked for
    weights = load_weights(tmp_path / "out", ParallelContext.single())
    assert weights.dtype == (torch.float32 if expected == torch.float32 else torch.bfloat16)
    exact = load_weights(tmp_path / "out", ParallelContext.single(), torch.float32)
    head = tensors["lm_head.weight"].to(expected).float()
    assert any(torch.equal(tensor, head) for tensor in exact.tensors.values() if tensor.shape == head.shape)


def test_types_that_differ_must_be_chosen(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", hf_config("llama"))
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    for work in (convert, export):
        arguments = (3, None) if work is convert else ()
        with pytest.raises(ValueError, match=r"several types \(.*model\.norm\.weight is fp32.*choose one with --dtype"):
            work(tmp_path / "hf", tmp_path / "out", *arguments)
    convert(tmp_path / "hf", tmp_path / "out", 3, torch.float32)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_overflow_into_fp16_is_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", hf_config("llama"))
    tensors = {name: torch.ones_like(tensor) for name, tensor in load_file(tmp_path / "hf/model.safetensors").items()}
    tensors["lm_head.weight"][3, 5] = 70_000
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight holds 1 values .* after conversion \(they were"):
        convert(tmp_path / "hf", tmp_path / "out", 2, torch.float16)
    assert not (tmp_path / "out").exists()
