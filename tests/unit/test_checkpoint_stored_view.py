"""StoredView: parts of every kind, those too that no family has yet, against slices of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_lowbit.checkpoint.safetensors_file import SafetensorsFile
from megatron_lowbit.checkpoint.stored_view import StoredView, part_shape
from megatron_lowbit.stored import StoredPart

WHOLE = torch.arange(3 * 8 * 5, dtype=torch.float32).reshape(3, 8, 5)
CASES = {
    "every other row": (StoredPart("flat", (8, 5), start=1, stop=8, step=2), WHOLE[0, 1::2]),
    "rows": (StoredPart("flat", (8, 5), start=2, stop=7), WHOLE[0, 2:7]),
    "turned": (StoredPart("flat", (8, 5), transposed=True), WHOLE[0].t()),
    "turned, every third": (StoredPart("flat", (8, 5), transposed=True, step=3), WHOLE[0].t()[::3]),
    "one of three": (StoredPart("stack", (3, 8, 5), index=2), WHOLE[2]),
    "one of three, every other row": (StoredPart("stack", (3, 8, 5), index=1, start=1, step=2), WHOLE[1, 1::2]),
    "one of three, turned": (StoredPart("stack", (3, 8, 5), index=1, transposed=True, stop=3), WHOLE[1].t()[:3]),
    "one row": (StoredPart("flat", (8, 5), index=4, start=1), WHOLE[0, 4, 1:]),
}


@pytest.mark.parametrize("what", CASES)
def test_parts(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lowbit.checkpoint.stored_view.ROW_BLOCK_NBYTES", 3 * 5 * 4)
    save_file({"flat": WHOLE[0].clone(), "stack": WHOLE.clone()}, tmp_path / "w.safetensors")
    file = SafetensorsFile(tmp_path / "w.safetensors")
    part, expected = CASES[what]
    view = StoredView(tmp_path, dict.fromkeys(file.tensors, file), {"part": part})
    assert view.shape("part") == part_shape(part) == tuple(expected.shape)
    assert torch.equal(view.read("part"), expected)
    for dim, extent in enumerate(expected.shape):
        for start in range(extent + 1):
            for stop in range(start, extent + 1):
                span = view.read_span("part", dim, start, stop)
                assert span.is_contiguous() and torch.equal(span, expected.narrow(dim, start, stop - start))
