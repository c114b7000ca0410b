"""The calibration file: written whole or not at all, read back the same, refused with a reason where it is damaged."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_lowbit.calibration import artifact
from megatron_lowbit.calibration.artifact import STATISTICS, CommCalibration, SyncPointStatistics

NAMES = ["layers.0.self_attn.o_proj", "layers.0.mlp.down_proj"]


def made(seed=0, tp=3, hidden=10) -> CommCalibration:
    generator = torch.Generator().manual_seed(seed)

    def point() -> SyncPointStatistics:
        shapes = ((tp, hidden), (tp, hidden), (hidden,), (hidden,))
        return SyncPointStatistics(*(torch.randn(shape, generator=generator) for shape in shapes))

    return CommCalibration("f" * 64, tp, hidden, 16, 512, "a" * 64, {name: point() for name in NAMES})


@pytest.fixture
def path(tmp_path) -> Path:
    made().save(tmp_path / "calibration.safetensors")
    return tmp_path / "calibration.safetensors"


def rewrite(path: Path, change_tensors=None, **metadata: str | None) -> None:
    """The same file with some tensors or some metadata different."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        kept = {**file.metadata(), **metadata}
    if change_tensors is not None:
        change_tensors(tensors)
    save_file(tensors, path, {key: value for key, value in kept.items() if value is not None})


def test_comes_back_the_same(path):
    loaded, original = CommCalibration.load(path), made()
    for field in ("fingerprint", "tp", "hidden", "sequences", "length", "text_sha256"):
        assert getattr(loaded, field) == getattr(original, field)
    assert set(loaded.sync_points) == set(NAMES)
    for name in NAMES:
        for statistic in STATISTICS:
            got = getattr(loaded.sync_points[name], statistic)
            assert torch.equal(got, getattr(original.sync_points[name], statistic))
    assert loaded.digest() == original.digest()


def test_digest_tells_statistics_apart():
    """Every number counts, and so does the sync point it belongs to; the text it came from does not."""
    first = made()
    assert made().digest() == first.digest() != made(seed=1).digest()
    assert CommCalibration("e", 3, 10, 1, 2, "b", first.sync_points).digest() == first.digest()
    swapped = dict(zip(NAMES, reversed(list(first.sync_points.values())), strict=True))
    assert CommCalibration("f", 3, 10, 1, 2, "b", swapped).digest() != first.digest()
    for statistic in STATISTICS:
        changed = made()
        tensor = getattr(changed.sync_points[NAMES[1]], statistic)
        tensor.view(-1)[-1] = torch.nextafter(tensor.view(-1)[-1], torch.tensor(torch.inf))
        assert changed.digest() != first.digest(), statistic


def test_is_a_plain_safetensors_file(path):
    """Other tools can read it: names and shapes are part of the format."""
    tensors = load_file(path)
    assert set(tensors) == {f"{name}.{statistic}" for name in NAMES for statistic in STATISTICS}
    assert tensors[f"{NAMES[0]}.partial_min"].shape == (3, 10)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "megatron-lowbit-calibration" and metadata["version"] == "3"


def test_folders_are_made_and_files_replaced(tmp_path):
    path = tmp_path / "new" / "folder" / "c.safetensors"
    made().save(path)
    made(seed=1).save(path)
    assert CommCalibration.load(path).digest() == made(seed=1).digest()
    assert [entry.name for entry in path.parent.iterdir()] == ["c.safetensors"], "no temporary file is left"


def test_an_interrupted_save_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def interrupted(tensors, temporary, metadata):
        Path(temporary).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(seed=1).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no temporary file is left"


def test_the_new_file_takes_the_place_of_the_old_one_at_once(path, tmp_path):
    """A rename, not a rewrite: whoever has the old file open keeps it whole, and nobody ever sees half of the new."""
    before = path.read_bytes()
    os.link(path, tmp_path / "held")
    made(seed=1).save(path)
    assert (tmp_path / "held").read_bytes() == before != path.read_bytes()


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"none\.safetensors not found; make it with `megatron-lowbit calibrate`"
    ):
        CommCalibration.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError):
        CommCalibration.load(tmp_path)  # a folder


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, 0.5, 0.99, -1])
def test_truncated_files_are_refused(path, kept):
    data = path.read_bytes()
    count = len(data) + kept if kept < 0 else int(kept * len(data)) if isinstance(kept, float) else kept
    path.write_bytes(data[:count])
    with pytest.raises(ValueError, match=r"is damaged.*run `megatron-lowbit calibrate` again"):
        CommCalibration.load(path)


@pytest.mark.parametrize("garbage", [b"", b"not a safetensors file at all" * 20, b"\xff" * 64])
def test_other_bytes_are_refused(path, garbage):
    path.write_bytes(garbage)
    with pytest.raises(ValueError, match="is damaged"):
        CommCalibration.load(path)


def test_a_file_of_another_kind_is_refused(path):
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is not a calibration file"):
        CommCalibration.load(path)
    save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"is not a calibration file \(format 'pt'\)"):
        CommCalibration.load(path)


@pytest.mark.parametrize("version", ["4", "0", "1.0", None])
def test_another_version_is_refused(path, version):
    rewrite(path, version=version)
    with pytest.raises(ValueError, match=f"version {re.escape(repr(version))}, this program reads versions 1, 2, 3"):
        CommCalibration.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{NAMES[1]}.sum_max"), r"lacks statistics of \['layers.0.mlp.down_proj'\]"),
        (lambda tensors: tensors.clear(), "lacks statistics of every sync point"),
        (lambda tensors: tensors.update({f"{NAMES[0]}.sum_min": torch.zeros(11)}), r"sum_min is torch.float32 \(11,\)"),
        (lambda tensors: tensors.update({f"{NAMES[0]}.sum_min": torch.zeros(10).half()}), "sum_min is torch.float16"),
        (
            lambda tensors: tensors.update({f"{NAMES[0]}.partial_max": torch.zeros(2, 10)}),
            r"expected float32 \(3, 10\)",
        ),
        (
            lambda tensors: tensors.update({f"{NAMES[0]}.mean": torch.zeros(10)}),
            "mean is missing or unknown",
        ),
    ],
)
def test_incomplete_or_foreign_statistics_are_refused(path, change, message):
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        CommCalibration.load(path)


@pytest.mark.parametrize("key", ["tp", "hidden", "sequences", "length", "fingerprint", "text_sha256"])
def test_metadata_that_is_missing_or_no_number_is_refused(path, key):
    """ValueError like every other damage, not a KeyError from inside."""
    original = path.read_bytes()
    rewrite(path, **{key: None})
    with pytest.raises(ValueError, match=r"calibrate` again"):
        CommCalibration.load(path)
    if key not in ("fingerprint", "text_sha256"):
        path.write_bytes(original)
        rewrite(path, **{key: "many"})
        with pytest.raises(ValueError, match=r"calibrate` again"):
            CommCalibration.load(path)


def test_values_that_are_not_finite_are_refused(path):
    """A NaN range would become a NaN scale, and with it every value of the feature."""
    rewrite(path, lambda tensors: tensors[f"{NAMES[0]}.partial_max"].__setitem__((1, 2), torch.nan))
    with pytest.raises(ValueError, match=r"partial_max holds values that are not finite"):
        CommCalibration.load(path)


def test_fits_its_model_and_size_only():
    calibration = made()
    calibration.check_fits("f" * 64, 3, "file")
    with pytest.raises(ValueError, match=r"belongs to another model \(fingerprint ffffffffffff, this model has eeeee"):
        calibration.check_fits("e" * 64, 3, "file")
    with pytest.raises(ValueError, match=r"made for 3 tensor-parallel ranks, this run has 4.*--tp 4"):
        calibration.check_fits("f" * 64, 4, "file")
