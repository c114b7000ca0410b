"""MXFP4 weights: bit for bit what transformers makes of the published packing, whole or in spans."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_lowbit.checkpoint.mxfp4 import dequantise, with_mxfp4_dequantised
from megatron_lowbit.checkpoint.safetensors_file import SafetensorsFile

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
