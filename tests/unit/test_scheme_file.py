"""Scheme files: scheme and calibration in one file, read back the same, refused with a reason; evaluate and LLM."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.model_cases import prompt_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_lowbit.calibration.artifact import CommCalibration, SyncPointStatistics
from megatron_lowbit.calibration.scheme_file import SchemeOrigin, TunedScheme, is_scheme_file
from megatron_lowbit.calibration_run import calibrate
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.evaluation import evaluate
from megatron_lowbit.llm import LLM
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.weights import load_weights

ORIGIN = SchemeOrigin(4.25, None, 4.2, 0.02, "int4-g64-prescaled", 0.03, "model", "text.txt", "a" * 64)
FORMATS = {
    "layers.0.mlp.down_proj": ("int5-g32-prescaled", "int3-g64-e4m3-prescaled-outlier"),
    "layers.1.self_attn.o_proj": ("int2-g64-prescaled", "int4-g128-prescaled"),
}
BASE = "int4-g64-prescaled"


def made() -> TunedScheme:
    generator = torch.Generator().manual_seed(0)

    def point() -> SyncPointStatistics:
        shapes = ((3, 70), (3, 70), (70,), (70,))
        return SyncPointStatistics(*(torch.randn(shape, generator=generator) for shape in shapes))

    names = [f"layers.{layer}.{part}" for layer in range(2) for part in ("self_attn.o_proj", "mlp.down_proj")]
    calibration = CommCalibration("f" * 64, 3, 70, 16, 512, "a" * 64, {name: point() for name in names})
    return TunedScheme("any", BASE, FORMATS, ORIGIN, calibration)


@pytest.fixture
def path(tmp_path) -> Path:
    made().save(tmp_path / "tuned.safetensors")
    return tmp_path / "tuned.safetensors"


def rewrite(path: Path, stored: object) -> None:
    """The same file with another scheme; a dict is merged with the one that is there."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if isinstance(stored, dict):
        stored = {key: value for key, value in {**json.loads(metadata["scheme"]), **stored}.items() if value != "gone"}
    save_file(tensors, path, {**metadata, "scheme": stored if isinstance(stored, str) else json.dumps(stored)})


def test_comes_back_the_same_under_its_files_name(path):
    loaded, original = TunedScheme.load(path), made()
    assert loaded.name == loaded.scheme.name == "tuned.safetensors" and loaded.origin == ORIGIN
    assert replace(loaded.scheme, name="any") == original.scheme
    assert loaded.calibration.digest() == original.calibration.digest()


def test_each_point_has_its_formats_and_others_the_bases(path):
    scheme, names = TunedScheme.load(path).scheme, sorted(made().calibration.sync_points)
    for name, (reduce_name, gather_name) in FORMATS.items():
        at = scheme.at(name, names)
        assert at.reduce_stage == parse_scheme(reduce_name).reduce_stage
        assert at.gather_stage == parse_scheme(gather_name).reduce_stage
        assert at.outlier_count(70) == (1 if "outlier" in gather_name else 0)
    other = scheme.at("layers.0.self_attn.o_proj", names)
    assert (other.reduce_stage, other.outlier_count(70)) == (parse_scheme(BASE).reduce_stage, 0)


def test_it_is_a_calibration_file_too(path):
    assert CommCalibration.load(path).digest() == made().calibration.digest()


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ("not json", "Expecting value"),
        ([], "no table"),
        ({"base": "gone"}, "lacks 'base'"),
        ({"formats": "gone"}, "lacks 'formats'"),
        ({"base": "int9"}, "unknown scheme 'int9'"),
        ({"base": "int4-g64:one-stage"}, "two stages"),
        ({"formats": {"layers.9.mlp.down_proj": [BASE, BASE]}}, "'layers.9.mlp.down_proj', which is no sync point"),
        ({"formats": {"layers.0.mlp.down_proj": [BASE]}}, "not a pair"),
        ({"formats": {"layers.0.mlp.down_proj": [BASE, "int4-g64-random"]}}, "random"),
        ({"formats": {"layers.0.mlp.down_proj": [BASE, "int12"]}}, "no format is called 'int12'"),
        ({"formats": [1]}, "no table 'formats'"),
        ({"origin": {}}, "of its origin is missing or unknown"),
    ],
)
def test_a_damaged_scheme_is_refused_with_a_reason(path, stored, reason):
    rewrite(path, stored)
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        TunedScheme.load(path)
    assert str(path) in str(caught.value) and "tune-scheme" in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="tune-scheme"):
        TunedScheme.load(tmp_path / "absent.safetensors")
    made().calibration.save(tmp_path / "calibration.safetensors")
    with pytest.raises(ValueError, match="calibration without a scheme; pass it with --calibration"):
        TunedScheme.load(tmp_path / "calibration.safetensors")
    with pytest.raises(ValueError, match="let it end in"):
        made().save(tmp_path / "int4")
    assert not (tmp_path / "int4").exists()


def test_names_of_schemes_are_not_taken_for_files():
    assert is_scheme_file("a/b.safetensors") and is_scheme_file(Path("any"))
    assert not any(
        is_scheme_file(name) for name in ("balanced", "int4-g64-prescaled:predict:loop", "int4-random:seed=1")
    )


def test_evaluate_and_llm_use_its_calibration(tiny_models, tmp_path):
    """Among other schemes, with another calibration for those: the file's own must count."""
    weights = load_weights(tiny_models("odd"), ParallelContext.virtual_ranks(3), torch.float32)
    windows = [prompt_of(131, 40, start) for start in range(4)]
    own, other = calibrate(weights, windows, "0" * 64), calibrate(weights, windows[:1], "0" * 64)
    formats = {name: ("int4-g32-prescaled-outlier", "int3-g32-prescaled") for name in list(own.sync_points)[:2]}
    TunedScheme("any", BASE + ":predict:loop", formats, ORIGIN, own).save(tmp_path / "tuned.safetensors")
    tuned = TunedScheme.load(tmp_path / "tuned.safetensors")

    assert tuned.scheme.loop and tuned.scheme.predictor_rank  # they are the base's
    rows = evaluate(weights, [BASE, tuned], windows, other)
    assert [row.scheme for row in rows] == [BASE, "tuned.safetensors"]
    expected = evaluate(weights, [tuned.scheme], windows, own)[0]
    assert rows[1].kl_mean == expected.kl_mean > 0
    assert rows[1].kl_mean != evaluate(weights, [tuned.scheme], windows, other)[0].kl_mean
    assert rows[0].kl_mean == evaluate(weights, [BASE], windows, other)[0].kl_mean
    with pytest.raises(ValueError, match="two different schemes are called"):
        evaluate(weights, [tuned, replace(tuned, base=BASE)], windows, other)

    class NoTokenizer:
        pass

    llm = LLM(weights, scheme=str(tmp_path / "tuned.safetensors"), tokenizer=NoTokenizer(), policy=None)  # type: ignore[arg-type]
    assert llm.scheme == tuned.scheme
    with pytest.raises(ValueError, match="calibration of its own"):
        LLM(weights, scheme=tuned, calibration=other, tokenizer=NoTokenizer(), policy=None)  # type: ignore[arg-type]
