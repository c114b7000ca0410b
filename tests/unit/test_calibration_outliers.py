"""From ranges to constants: the features that stay BF16, their ties, the random baseline, the scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import golden_method
from helpers.golden_messages import golden_format

from megatron_lowbit.calibration.artifact import CommCalibration, SyncPointStatistics
from megatron_lowbit.calibration.outliers import (
    aggregated_range,
    constants_from_statistics,
    random_outliers,
    select_outliers,
    sync_point_constants,
)
from megatron_lowbit.comm.constants import LARGEST_BF16, NO_CONSTANTS, static_constants
from megatron_lowbit.comm.schemes import parse_scheme

CPU = torch.device("cpu")


def statistics(ranks=3, hidden=130, seed=0) -> SyncPointStatistics:
    generator = torch.Generator().manual_seed(seed)
    low, high = (torch.randn(ranks + 1, hidden, generator=generator) * 4 for _ in range(2))
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    return SyncPointStatistics(low[:ranks], high[:ranks], low[ranks], high[ranks])


def calibration(**points: SyncPointStatistics) -> CommCalibration:
    return CommCalibration("f" * 64, 3, 130, 16, 64, "0" * 64, points)


def test_aggregated_range_by_hand():
    # rank 0: 2 * max(|-3|, |1|) = 6, 2 * max(0, 2) = 4; rank 1: 2 * 5 = 10, 2 * 0.5 = 1
    point = SyncPointStatistics(
        torch.tensor([[-3.0, 0.0], [-1.0, -0.5]]), torch.tensor([[1.0, 2.0], [5.0, 0.25]]), *torch.zeros(2, 2)
    )
    assert aggregated_range(point).tolist() == [16.0, 5.0]


@pytest.mark.parametrize(
    ("ranges", "count", "expected"),
    [
        ([1.0, 9.0, 3.0, 7.0], 2, [1, 3]),
        ([1.0, 9.0, 3.0, 7.0], 0, []),
        ([1.0, 9.0, 3.0, 7.0], 4, [0, 1, 2, 3]),
        ([5.0, 5.0, 5.0, 5.0], 2, [0, 1]),  # of equal ranges the lower feature
        ([1.0, 5.0, 9.0, 5.0, 5.0], 3, [1, 2, 3]),
        ([0.0, 0.0, 0.0], 1, [0]),
    ],
)
def test_selection_and_ties(ranges, count, expected):
    got = select_outliers(torch.tensor(ranges, dtype=torch.float64), count)
    assert got.dtype == torch.int64 and got.tolist() == expected


def test_ties_among_many_features():
    """Large enough for torch to take another sorting algorithm, of which stability was asked."""
    ranges = torch.zeros(5000, dtype=torch.float64)
    ranges[4000:] = 1.0
    assert select_outliers(ranges, 78).tolist() == list(range(4000, 4078))


@pytest.mark.parametrize("seed", range(5))
def test_constants_equal_the_independent_implementation(seed):
    point = statistics(seed=seed)
    point.partial_min[:, 20:40] = -1.0  # ties
    point.partial_max[:, 20:40] = 1.0
    constants = constants_from_statistics(parse_scheme("int4-outlier"), "any", point)
    outliers = golden_method.chosen_outliers(point.partial_min.numpy(), point.partial_max.numpy(), 130 // 64)
    body = sorted(set(range(130)) - set(outliers))
    assert constants.outlier_index is not None and constants.outlier_index.tolist() == outliers
    assert constants.body_index is not None and constants.body_index.tolist() == body
    partial = golden_method.static_scale(point.partial_min.numpy(), point.partial_max.numpy())[:, body]
    total = golden_method.static_scale(point.sum_min.numpy(), point.sum_max.numpy())[body]
    assert constants.reduce_scale_RD is not None and constants.gather_scale_1D is not None
    np.testing.assert_array_equal(constants.reduce_scale_RD.numpy(), partial)
    np.testing.assert_array_equal(constants.gather_scale_1D.numpy(), total[None])


@pytest.mark.parametrize("name", ["int2", "int3", "int5", "int8-outlier", "fp8", "fp4-outlier"])
def test_scales_of_other_codes_equal_the_independent_implementation(name):
    scheme, point = parse_scheme(name), statistics()
    constants = constants_from_statistics(scheme, "any", point)
    wire = golden_format(scheme.reduce_stage, 130)
    body = slice(None) if constants.body_index is None else constants.body_index.numpy()
    partial = golden_method.static_scale(point.partial_min.numpy(), point.partial_max.numpy(), wire)[:, body]
    total = golden_method.static_scale(point.sum_min.numpy(), point.sum_max.numpy(), wire)[None, body]
    assert constants.reduce_scale_RD is not None and constants.gather_scale_1D is not None
    np.testing.assert_array_equal(constants.reduce_scale_RD.numpy(), partial)
    np.testing.assert_array_equal(constants.gather_scale_1D.numpy(), total)
    assert constants.reduce_minimum_RD is None and constants.gather_minimum_1D is None


def test_asymmetric_constants_by_hand():
    # bf16 has steps of 2^-7 at 1 and 2^-1 at 100. [-1, 6]: 7/14. [100.3, 101]: 100 lies below, (101 - 100)/14 = 0.0714
    # = 1.142857 * 2^-4, 0.142857 * 128 = 18.3, up to 19. [0, 0] and [-0, -0]: minimum +0, the floor. Then no overflow.
    low = torch.tensor([-1.0, 100.3, 0.0, -0.0, -3.4e38])
    high = torch.tensor([6.0, 101.0, 0.0, -0.0, 3.4e38])
    scale, minimum = static_constants(parse_scheme("int4-asym").reduce_stage, low, high)
    assert scale is not None and minimum is not None
    assert minimum.tolist() == [-1.0, 100.0, 0.0, 0.0, -LARGEST_BF16] and not torch.signbit(minimum[2:4]).any()
    assert scale[:4].tolist() == [0.5, (1 + 19 / 128) * 2**-4, 2.0**-100, 2.0**-100] and scale[4].isfinite()


@pytest.mark.parametrize("bits", range(2, 9))
def test_asymmetric_ranges_are_covered_and_not_much_more(bits):
    wire = parse_scheme(f"int{bits}-asym").reduce_stage
    generator = torch.Generator().manual_seed(bits)
    low = torch.randn(10_000, generator=generator) * 100
    high = low + torch.randn(10_000, generator=generator).exp() * 10
    scale, minimum = static_constants(wire, low, high)
    assert scale is not None and minimum is not None
    for side in (scale, minimum):
        assert torch.equal(side, side.bfloat16().float())
    top = minimum.double() + scale.double() * (2**bits - 2)
    assert (minimum <= low).all() and (top >= high.double()).all()
    # rounding moves the minimum by at most an ulp, and the scale by one: 2^-7 of each
    width = (high.double() - low.double()) + low.abs().double() * 2.0**-7
    assert (top - minimum.double() <= width * (1 + 2.0**-7)).all()
    assert (top - minimum.double()).mean() < 1.1 * (high - low).double().mean()


def test_factors_of_prescaled_formats_by_hand():
    # square roots of (1 + 7)/2, (0 + 32)/2 and, for a feature never seen, 2^-8 of the largest
    low, high = torch.tensor([[-1.0, 0.0, 0.0]]), torch.tensor([[7.0, 32.0, 0.0]])
    factor, minimum = static_constants(parse_scheme("int4-g64-prescaled").reduce_stage, low, high)
    assert factor is not None and factor.tolist() == [[2.0, 4.0, 4 * 2.0**-8]] and minimum is None
    factor, _ = static_constants(parse_scheme("nvfp4-prescaled").reduce_stage, low * 0, high * 0)
    assert factor is not None and factor.tolist() == [[2.0**-100] * 3]


def test_a_stage_without_outliers_has_constants_for_every_feature():
    constants = constants_from_statistics(parse_scheme("int4-asym+int5-outlier"), "any", statistics())
    shapes = [None if part is None else tuple(part.shape) for part in vars(constants).values()]
    assert shapes == [(128,), (2,), (3, 130), (1, 128), (3, 130), None, None, None]


def test_groups_with_outliers_need_their_index_sets_only():
    point = statistics()
    constants = constants_from_statistics(parse_scheme("int4-g32-outlier"), "any", point)
    expected = constants_from_statistics(parse_scheme("int4-outlier"), "any", point)
    assert constants.outlier_index is not None and torch.equal(constants.outlier_index, expected.outlier_index)
    assert constants.body_index is not None and len(constants.body_index) == 128
    assert constants.reduce_scale_RD is None and constants.gather_scale_1D is None
    drawn = sync_point_constants(parse_scheme("int4-g32-random:seed=2"), "a", 130, None, CPU)
    assert drawn.outlier_index is not None and drawn.reduce_scale_RD is None
    assert drawn.outlier_index.tolist() == random_outliers(130, 2, "a", 2).tolist()
    with pytest.raises(ValueError, match=r"'int4-g32-outlier' has calibrated outliers and needs a calibration file"):
        sync_point_constants(parse_scheme("int4-g32-outlier"), "a", 130, None, CPU)


def test_plain_int4_sets_nothing_apart():
    constants = constants_from_statistics(parse_scheme("int4"), "any", statistics())
    assert constants.body_index is None and constants.outlier_index is None
    assert constants.reduce_scale_RD is not None and constants.reduce_scale_RD.shape == (3, 130)
    assert constants.gather_scale_1D is not None and constants.gather_scale_1D.shape == (1, 130)


def test_a_feature_never_seen_gets_a_scale_above_zero():
    point = statistics()
    for part in point.tensors().values():
        part[..., 7] = 0.0
    constants = constants_from_statistics(parse_scheme("int4"), "any", point)
    assert constants.reduce_scale_RD is not None and constants.gather_scale_1D is not None
    assert (constants.reduce_scale_RD[:, 7] == 2.0**-100).all() and constants.gather_scale_1D[0, 7] == 2.0**-100
    assert (1 / constants.reduce_scale_RD).isfinite().all()


def test_scales_are_bf16_numbers():
    """So that code times scale is exact in FP32, on every device."""
    constants = constants_from_statistics(parse_scheme("int4-outlier"), "any", statistics())
    for scale in (constants.reduce_scale_RD, constants.gather_scale_1D):
        assert scale is not None and torch.equal(scale, scale.bfloat16().float())


def test_random_sets_come_from_seed_and_name_alone():
    first = random_outliers(4096, 64, "layers.0.mlp.down_proj", 0)
    torch.rand(3)  # the global generator has no say
    assert torch.equal(first, random_outliers(4096, 64, "layers.0.mlp.down_proj", 0))
    assert first.tolist() == sorted(set(first.tolist())) and len(first) == 64
    assert first[0] >= 0 and first[-1] < 4096
    others = [
        random_outliers(4096, 64, "layers.1.mlp.down_proj", 0),
        random_outliers(4096, 64, "layers.0.mlp.down_proj", 1),
        random_outliers(4096, 64, "layers.0.self_attn.o_proj", 0),
    ]
    for other in others:  # 64 of 4096 share 1 on average, all 64 never
        assert len(set(other.tolist()) & set(first.tolist())) < 10
    # drawn from the whole row: the mean of 64 of 4096 lies within 2048 +- 4 * 1182 / 8
    assert 1450 < first.double().mean() < 2650


def test_random_sets_leave_the_generator_of_others_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    random_outliers(100, 3, "a", 0)
    assert torch.equal(torch.rand(2), expected)


def test_the_random_baseline_uses_its_seed_and_sync_point():
    point = statistics(hidden=640)
    calibrated = constants_from_statistics(parse_scheme("int4-outlier"), "a", point).outlier_index
    first = constants_from_statistics(parse_scheme("int4-random"), "a", point).outlier_index
    assert calibrated is not None and first is not None and len(first) == len(calibrated) == 10
    assert first.tolist() == random_outliers(640, 10, "a", 0).tolist() != calibrated.tolist()
    for scheme, name in (("int4-random:seed=1", "a"), ("int4-random", "b")):
        other = constants_from_statistics(parse_scheme(scheme), name, point).outlier_index
        assert other is not None and other.tolist() != first.tolist()


@pytest.mark.parametrize("scheme", ["exact", "bf16", "int4-group", "int8-group:one-stage"])
def test_schemes_without_static_scales_need_no_constants(scheme):
    assert sync_point_constants(parse_scheme(scheme), "any", 130, None, CPU) is NO_CONSTANTS
    assert constants_from_statistics(parse_scheme(scheme), "any", statistics()) is NO_CONSTANTS


def test_what_is_missing_is_named():
    scheme = parse_scheme("int4-outlier")
    with pytest.raises(ValueError, match=r"'int4-outlier' has static scales.*megatron-lowbit calibrate.*--calibration"):
        sync_point_constants(scheme, "a", 130, None, CPU)
    with pytest.raises(ValueError, match=r"no sync point 'b' of 130 features \(it has 1 of 130\)"):
        sync_point_constants(scheme, "b", 130, calibration(a=statistics()), CPU)
    with pytest.raises(ValueError, match="of 131 features"):
        sync_point_constants(scheme, "a", 131, calibration(a=statistics()), CPU)
    constants = sync_point_constants(scheme, "a", 130, calibration(a=statistics()), CPU)
    assert constants.outlier_index is not None and len(constants.outlier_index) == 2
