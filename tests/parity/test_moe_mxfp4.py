"""MXFP4 weights: bit for bit what transformers makes of the published packing, whole, in spans, and in a model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.model_cases import logits_of, prompt_of
from helpers.tiny_moe import random_moe
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from checkpoints_conv.convert import convert
from megatron_lowbit.checkpoint.mxfp4 import dequantise, with_mxfp4_dequantised
from megatron_lowbit.checkpoint.safetensors_file import SafetensorsFile
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.weights import load_weights

NAME = "model.layers.0.mlp.experts.gate_up_proj"


def packed(experts: int, rows: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks and scales; the scales keep every product finite and some of them below the normal numbers."""
    generator = torch.Generator().manual_seed(experts * 100 + rows)
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 252, (experts, rows, groups), dtype=torch.uint8, generator=generator)
    return blocks, scales


def saved(folder: Path, tensors: dict[str, torch.Tensor], file: str = "w.safetensors") -> dict[str, SafetensorsFile]:
    save_file(tensors, folder / file)
    opened = SafetensorsFile(folder / file)
    return dict.fromkeys(opened.tensors, opened)


@pytest.mark.parametrize(("experts", "rows", "groups"), [(1, 1, 1), (3, 10, 3), (5, 6, 7), (7, 33, 2)])
def test_equals_transformers(tmp_path, experts, rows, groups):
    blocks, scales = packed(experts, rows, groups)
    expected = convert_moe_packed_tensors(blocks, scales)
    files = with_mxfp4_dequantised(
        saved(tmp_path, {NAME + "_blocks": blocks}) | saved(tmp_path, {NAME + "_scales": scales}, "v.safetensors")
    )
    assert set(files) == {NAME}
    file = files[NAME]
    assert file.tensors[NAME].shape == expected.shape == (experts, groups * 32, rows)
    assert file.tensors[NAME].dtype == torch.bfloat16
    got = file.read(NAME)
    assert torch.equal(got, expected) and got.is_contiguous()
    for dim, extent in enumerate(expected.shape):
        for start, stop in ((0, extent), (extent // 3, extent // 2 + 1), (extent - 1, extent), (extent, extent)):
            span = file.read_span(NAME, dim, start, stop)
            assert torch.equal(span, expected.narrow(dim, start, stop - start)) and span.is_contiguous()
    got.zero_()
    assert torch.equal(file.read(NAME), expected), "what was returned is the caller's"


def test_every_code_and_every_exponent():
    """From the format's definition: sign, 2 bits of exponent with bias 1, 1 bit of mantissa; factor 2^(s - 127)."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 1, 16)
    values = dequantise(codes, torch.full((16, 1), 127, dtype=torch.uint8)).flatten()
    for byte in range(256):
        for half, code in enumerate((byte & 15, byte >> 4)):
            exponent, mantissa = (code >> 1) & 3, code & 1
            magnitude = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
            assert values[2 * byte + half] == (-magnitude if code & 8 else magnitude)
    ones = torch.full((256, 1, 16), 0x22, dtype=torch.uint8)  # code 2 is 1.0
    factors = dequantise(ones, torch.arange(256, dtype=torch.uint8)[:, None])[:, 0].tolist()
    assert factors[:255] == [2.0 ** (scale - 127) for scale in range(255)]
    assert math.isnan(factors[255]), "the format's NaN must surface"


def test_other_tensors_stay(tmp_path):
    blocks, scales = packed(2, 4, 1)
    files = saved(tmp_path, {NAME + "_blocks": blocks, NAME + "_scales": scales, NAME + "_bias": torch.ones(2, 4)})
    found = with_mxfp4_dequantised(files)
    assert set(found) == {NAME, NAME + "_bias"}
    assert found[NAME + "_bias"].read(NAME + "_bias").shape == (2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NAME + "_scales"), "without .*gate_up_proj_scales; download"),
        (lambda tensors: tensors.pop(NAME + "_blocks"), "without .*gate_up_proj_blocks; download"),
        (lambda tensors: tensors.update({NAME: torch.ones(1)}), "there is .*gate_up_proj beside"),
        (
            lambda tensors: tensors.update({NAME + "_scales": torch.ones(2, 4, 3, dtype=torch.uint8)}),
            r"scales torch.uint8 \(2, 4, 3\); expected uint8 \[experts, rows",
        ),
        (lambda tensors: tensors.update({NAME + "_blocks": torch.ones(2, 4, 1, 16)}), "blocks torch.float32"),
        (
            lambda tensors: tensors.update({NAME + "_blocks": torch.ones(2, 4, 1, 8, dtype=torch.uint8)}),
            r"blocks torch.uint8 \(2, 4, 1, 8\)",
        ),
    ],
)
def test_damaged_pairs_are_refused(tmp_path, change, message):
    blocks, scales = packed(2, 4, 1)
    tensors = {NAME + "_blocks": blocks, NAME + "_scales": scales}
    change(tensors)
    with pytest.raises(ValueError, match=message) as caught:
        with_mxfp4_dequantised(saved(tmp_path, tensors))
    assert "w.safetensors" in str(caught.value)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder as gpt-oss is published: experts in MXFP4, the rest not; the model in transformers, dequantised)."""
    folder = tmp_path_factory.mktemp("mxfp4") / "model"
    model = random_moe(
        "gpt_oss",
        dict(
            hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=32,
            vocab_size=79, num_hidden_layers=2, num_local_experts=5, num_experts_per_tok=2, sliding_window=8,
            max_position_embeddings=64, rope_parameters=dict(
                rope_type="yarn", factor=4.0, truncate=False, original_max_position_embeddings=16, rope_theta=500.0,
            ),
        ),
    )  # fmt: skip
    packed_tensors = {}
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if weight.dim() == 3:
            experts, columns, rows = weight.shape
            shape = (experts, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(121, 125, shape, dtype=torch.uint8, generator=generator)
            weight.data = convert_moe_packed_tensors(blocks, scales).float()
            packed_tensors |= {name + "_blocks": blocks, name + "_scales": scales}
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if name + "_blocks" not in packed_tensors}
    assert len(kept) == len(stored) - 4
    save_file(kept | packed_tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = dict(quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


def test_a_published_checkpoint_runs(published):
    folder, model = published
    prompt = prompt_of(79, 40)
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    weights = load_weights(folder, ParallelContext.virtual_ranks(3), torch.float32)
    # FP32 rounding as in test_moe_models
    torch.testing.assert_close(logits_of(weights, prompt), expected, rtol=0, atol=1e-4)


def test_a_published_checkpoint_converts(published, tmp_path):
    """In bf16, which holds every MXFP4 value: 2 rank files give the weights that the folder gives."""
    folder, _ = published
    convert(folder, tmp_path / "tp2", 2, torch.bfloat16)
    direct, converted = (
        load_weights(path, ParallelContext.virtual_ranks(3), torch.bfloat16) for path in (folder, tmp_path / "tp2")
    )
    for name, tensor in direct.tensors.items():
        expected = tensor.bfloat16().to(tensor.dtype)  # norms and biases are stored in bf16 too
        assert torch.equal(converted.tensors[name], expected), name
    name = "model.layers.1.mlp.experts.gate_up_proj"
    stored = load_file(folder / "model.safetensors")
    whole = convert_moe_packed_tensors(stored[name + "_blocks"], stored[name + "_scales"])
    gates = direct.tensors["layers.1.mlp.gate_up_proj"].view(5, 2, 32, 64)[:, 0]
    assert torch.equal(gates, whole[:, :, 0::2].transpose(1, 2))
