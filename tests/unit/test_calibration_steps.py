"""Fitted steps and means: what they are by hand and by trying, and what they bring to static formats."""

from __future__ import annotations

import pytest
import torch
from helpers.compensation_cases import draw_chain

from lowbit_kernels import get_backend
from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.calibration.moments import LATER
from megatron_lowbit.calibration.outliers import constants_from_statistics
from megatron_lowbit.calibration.predictor_fit import constant_predictor
from megatron_lowbit.calibration.step_observer import BITS, StepObserver
from megatron_lowbit.comm.rotated_codec import make_codec
from megatron_lowbit.comm.schemes import parse_scheme


def observed(values_LTH: torch.Tensor, weight_T: torch.Tensor | None = None) -> torch.Tensor:
    observer = StepObserver()
    weight_T = torch.ones(values_LTH.shape[1]) if weight_T is None else weight_T
    for part, weights in zip(values_LTH.split(37, dim=1), weight_T.split(37), strict=True):
        observer.update(part, weights)
    return observer.steps()


def loss(values_T: torch.Tensor, step: float, bits: int) -> float:
    """Mean squared error of integers with this step."""
    largest = 2 ** (bits - 1) - 1
    return float(((values_T / step).round().clamp(-largest, largest) * step - values_T).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_steps_lose_about_as_little_as_the_best_that_is_tried(bits):
    generator = torch.Generator().manual_seed(bits)
    normal = torch.randn(2, 4000, 3, generator=generator)
    values_LTH = normal * torch.tensor([0.01, 1.0, 300.0])
    values_LTH[1] = values_LTH[1].sign() * values_LTH[1].abs() ** 1.5  # a longer tail
    steps_LH = observed(values_LTH)[bits - BITS[0]]
    for row in range(2):
        for feature in range(3):
            values_T = values_LTH[row, :, feature]
            ends = values_T.abs().max() / (2 ** (bits - 1) - 1)
            best = min(loss(values_T, float(ends) * share / 200, bits) for share in range(10, 201))
            # one of the steps lies within an eighth of an octave, values are known as well; errors go by the square
            assert loss(values_T, float(steps_LH[row, feature]), bits) <= 2**0.5 * best


def test_features_that_never_move_and_odd_values():
    values_LTH = torch.zeros(1, 5, 3)
    values_LTH[0, 2, 1] = float("nan")
    values_LTH[0, :, 2] = torch.tensor([1e30, 0.0, -3e38, 1.0, float("inf")])
    steps = observed(values_LTH)
    assert bool(torch.isfinite(steps).all()) and bool((steps > 0).all())


def test_a_massive_token_does_not_decide():
    """Weighted by 1 over their mean square, a thousand ordinary tokens count more than one that is huge."""
    values_LTH = torch.randn(1, 1000, 64, generator=torch.Generator().manual_seed(0))
    alone = observed(values_LTH)
    values_LTH = torch.cat((values_LTH, torch.full((1, 1, 64), 2e4)), dim=1)
    weighted = observed(values_LTH, 1 / values_LTH[0].square().mean(dim=1))
    assert torch.allclose(weighted, alone, rtol=0.2)  # one step of the grid
    assert bool((observed(values_LTH)[2] > 100 * alone[2]).all())


def test_the_mean_is_foretold_whatever_the_input():
    mean_RH = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 50)
    predictor = constant_predictor(mean_RH).to(torch.device("cpu"))
    for input_TH in (torch.zeros(2, 50), torch.full((2, 50), 1e9), torch.full((2, 50), float("nan"))):
        codes = predictor.codes(input_TH)
        found_RH = torch.stack([predictor.of_rank(codes, rank)[1] for rank in range(3)])
        # coefficients have 127 steps for the largest mean of a feature among the ranks, their scale 8 bits
        assert bool(((found_RH - mean_RH).abs() <= mean_RH.abs().amax(dim=0) * (0.5 / 127 + 2**-8)).all())
        total = predictor.of_sum(codes)[0]
        assert torch.allclose(total, found_RH.sum(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3])
def test_fitted_steps_lose_less_than_ranges(bits):
    """On other values than were fitted; few codes have most to lose to values that are rare."""
    chain = draw_chain(1, 2, 200, 96, False)
    point = chain.statistics[0]
    errors = []
    for name in (f"int{bits}", f"int{bits}-fitted"):
        scheme = parse_scheme(name)
        constants = constants_from_statistics(scheme, "any", point)
        codec = make_codec(scheme.reduce_stage, 96, get_backend("torch"), None, None, constants.reduce_scale_RD)
        x = chain.partials[0][1]
        errors.append(float((codec.decode(codec.encode(x, 1), 1) - x.float()).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_files_of_version_2_have_neither(tmp_path):
    """They are read, and what needs more says so."""
    chain = draw_chain(1, 2, 20, 32, False)
    (point, *_) = chain.statistics
    assert point.moments is not None
    path = tmp_path / "c.safetensors"
    CommCalibration("f" * 64, 2, 32, 16, 64, "0" * 64, {"any": point}).save(path)
    back = CommCalibration.load(path).sync_points["any"]
    for name in LATER:
        assert torch.equal(getattr(back.moments, name), getattr(point.moments, name))
    from safetensors.torch import load_file, save_file

    older = {name: each for name, each in load_file(path).items() if name.rpartition(".")[2] not in LATER}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"version": "2"}
    save_file(older, path, metadata)
    old = CommCalibration.load(path).sync_points["any"]
    assert old.moments is not None and old.moments.partial_mean is None
    constants_from_statistics(parse_scheme("int4-g16-prescaled:predict=4:loop"), "any", old)
    for name, lacks in (("int4-fitted", "partial_step"), ("int4-g16:centred", "partial_mean")):
        with pytest.raises(ValueError, match=f"lacks {lacks}.*calibrate` again"):
            constants_from_statistics(parse_scheme(name), "any", old)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int4-g64-fitted", "fitted goes with static scales"),
        ("int4-asym-fitted", "fitted goes with static scales"),
        ("fp8-fitted", "fitted goes with static scales"),
        ("bf16-fitted", "fitted goes with static scales"),
        ("int4-g64-prescaled0", "no option of a format"),
        ("int4-g64-prescaled2", "no option of a format"),
        ("int4-g64-prescaled0.0", "exponent is 0"),
        ("int4-g64-prescaled0.7-prescaled", "a second time"),
        ("int4-outlier0", "no option of a format"),
        ("int4-outlier16+int4-outlier32", r"outlier_divisor \[16, 32\]"),
        ("int4:centred:one-stage", "centred"),
        ("int4:centred:predict", "which has means too"),
    ],
)
def test_what_makes_no_sense_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        parse_scheme(name)


def test_points_may_spend_different_shares():
    from dataclasses import replace

    from megatron_lowbit.comm.schemes import PointFormats

    base = parse_scheme("int4-outlier")
    wires = [parse_scheme(f"int4-outlier{divisor}").reduce_stage for divisor in (16, 128)]
    points = tuple(PointFormats(f"p{at}", wire, wire) for at, wire in enumerate(wires))
    scheme = replace(base, points=points)
    assert [scheme.at(name, ["p0", "p1", "p2"]).outlier_count(256) for name in ("p0", "p1", "p2")] == [16, 2, 4]
    with pytest.raises(ValueError, match="outlier_divisor"):
        replace(base, points=(PointFormats("p0", *wires),))
