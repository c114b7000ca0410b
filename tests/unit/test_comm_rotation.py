"""Rotated formats: their names, bytes and factors, what their codec promises, and what they are for."""

import pytest
import torch
from helpers import golden_rotation
from helpers.golden_messages import golden_format
from helpers.messages import ROTATED_SCHEMES, draw_message, same_bits

from lowbit_kernels import get_backend
from lowbit_kernels.rotation import Rotation, rotate
from megatron_lowbit.calibration.artifact import SyncPointStatistics
from megatron_lowbit.calibration.moments import SyncPointMoments
from megatron_lowbit.calibration.outliers import constants_from_statistics
from megatron_lowbit.comm.all_reduce import build_all_reduce
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.constants import NO_CONSTANTS, static_constants
from megatron_lowbit.comm.format_names import GRAMMAR, parse_format
from megatron_lowbit.comm.rotated_codec import RotatedCodec, make_codec
from megatron_lowbit.comm.saturation import SaturationCounter
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.comm.symmetric import SymmetricAllReduce
from megatron_lowbit.comm.wire_format import WireFormat
from megatron_lowbit.parallel import ParallelContext

# ---- names and bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wire", "choice", "bits"),
    # bits: nominal, at 4096 features, all of which travel as codes
    [
        ("int4-g64-rotated", WireFormat(4, 64, rotation="full"), "none", 4.25),
        ("int3-g64-hadamard64", WireFormat(3, 64, rotation=64), "none", 3.25),
        ("int4-rotated-g64-outlier", WireFormat(4, 64, 64, rotation="full"), "calibrated", 4.25 + 16 / 64),
        ("mxfp4-hadamard32-random", WireFormat(4, 32, 64, "e2m1", "e8m0", rotation=32), "random", 4.5),
        (
            "int4-g40-e4m3-prescaled-rotated",
            WireFormat(4, 40, scale_format="e4m3", prescaled=True, rotation="full"),
            *("none", 4 + (103 * 8 + 16) / 4096),
        ),
    ],
)
def test_names(name, wire, choice, bits):
    assert parse_format(name) == (wire, choice)
    assert wire.bits_per_value(4096) == bits
    assert wire.is_static is wire.prescaled and parse_scheme(name).needs_calibration is (
        wire.prescaled or "outlier" in name
    )
    assert wire.wire_bits_per_value(4096) == 8 * wire.packet_layout(4096).row_nbytes / 4096
    assert "-rotated" in GRAMMAR and "-hadamardN" in GRAMMAR


@pytest.mark.parametrize("name", ROTATED_SCHEMES)
@pytest.mark.parametrize("hidden", [1, 63, 65, 576, 1000])
def test_rows_are_as_long_as_the_description_says(name, hidden):
    scheme = parse_scheme(name)
    for wire in (scheme.reduce_stage, scheme.gather_stage):
        if wire is not None:
            nbytes = golden_rotation.row_nbytes(golden_format(wire, hidden), hidden, wire.rotation)
            assert wire.packet_layout(hidden).row_nbytes == nbytes
            assert wire.wire_bits_per_value(hidden) == 8 * nbytes / hidden >= wire.bits_per_value(hidden)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int4-rotated", "rotation is 'full' with group_size 0 and 4 bits; allowed: with a group_size"),
        ("int4-hadamard8-outlier", "rotation is 8 with group_size 0"),
        ("int4-asym-rotated", "say nothing of features that are mixed"),
        ("bf16-rotated", "rotation is 'full' with group_size 0 and 16 bits"),
        ("int4-g64-hadamard48", "blocks of 48; allowed: powers of two from 2 on, or 'full'"),
        ("int4-g64-hadamard1", "blocks of 1"),
        ("int4-g64-hadamard", "no option of a format is called 'hadamard'"),
        ("int4-g64-hadamard0", "'hadamard0'"),
        ("int4-g64-rotated-rotated", "settles rotation a second time"),
        ("int4-g64-rotated-hadamard64", "settles rotation a second time"),
    ],
)
def test_what_is_refused_and_why(text, reason):
    with pytest.raises(ValueError, match=f"unknown scheme .*{reason}"):
        parse_scheme(text)


def test_symmetric_memory_refuses_them():
    scheme = parse_scheme("int8-group+int4-g64-rotated")
    with pytest.raises(ValueError, match="rotates features; symmetric memory serves formats without -rotated"):
        SymmetricAllReduce(ParallelContext.virtual_ranks(2), scheme, 128, NO_CONSTANTS, None)  # type: ignore[arg-type]


# ---- factors --------------------------------------------------------------------------------------------------------


def statistics(partial_rms: torch.Tensor, sum_rms: torch.Tensor) -> SyncPointStatistics:
    ratio = torch.ones(partial_rms.shape[0])
    moments = SyncPointMoments(partial_rms, sum_rms, 2 * partial_rms, 2 * sum_rms, ratio, None)
    return SyncPointStatistics(-4 * partial_rms, 4 * partial_rms, -4 * sum_rms, 4 * sum_rms, moments)


def test_factors_are_one_set_for_all_ranks_by_hand():
    rms = torch.ones(2, 64)
    rms[:, 3] = torch.tensor([124.0, 68.0])  # (124^2 + 68^2) / 2 = 10000, whose root has the root 10
    rms[:, 5] = torch.tensor([0.0, 0.0])
    point = statistics(rms, torch.full((64,), 16.0))
    wire = parse_scheme("int4-g64-prescaled-rotated-outlier")
    constants = constants_from_statistics(wire, "any", point)
    assert constants.outlier_index.tolist() == [3] and len(constants.body_index) == 63
    expected = torch.ones(1, 64)  # of all features: the outlier's place is rotated too
    expected[0, 3], expected[0, 5] = 10.0, 10 * 2.0**-8
    assert torch.equal(constants.reduce_scale_RD, expected.bfloat16().float())
    assert torch.equal(constants.gather_scale_1D, torch.full((1, 64), 4.0))
    foretold = constants_from_statistics(parse_scheme("int4-g64-prescaled-rotated:predict=1"), "any", point)
    assert foretold.gather_scale_1D[0, 0] == torch.tensor(32.0**0.5).bfloat16()
    # without second moments, by the bounds: square roots of (1 + 7) / 2 and, over two ranks, of sqrt((6^2 + 8^2) / 2)
    low, high = torch.tensor([[-1.0, -6.0], [-1.0, -8.0]]), torch.tensor([[7.0, 6.0], [7.0, 8.0]])
    factor, minimum = static_constants(wire.reduce_stage, low, high)
    assert minimum is None and torch.equal(factor, torch.tensor([[2.0, 50**0.25]]).bfloat16().float())


# ---- the codec ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("name", [name for name in ROTATED_SCHEMES if "one-stage" not in name])
def test_steps_of_the_codec_fit_together(backend, name):
    """What is added, fed back and foretold is made of encode and decode, also where one stage alone is rotated."""
    message = draw_message(len(name), 3, name, tokens=5, hidden=200)
    scheme, constants = message.scheme, message.constants
    try:
        kernels = get_backend(backend)
    except ValueError as error:
        pytest.skip(str(error))
    index = constants.body_index, constants.outlier_index
    scale, own = constants.reduce_scale_RD, constants.gather_scale_1D
    reduce = make_codec(scheme.reduce_stage, 200, kernels, *index, scale, None, constants.reduce_minimum_RD)
    gather = make_codec(scheme.gather_stage, 200, kernels, *index, own, None, constants.gather_minimum_1D)
    assert isinstance(reduce, RotatedCodec) is bool(scheme.reduce_stage.rotation) is reduce.rotates
    packets = [reduce.encode(partial, rank) for rank, partial in enumerate(message.partials)]
    total = reduce.decode_sum(packets)
    expected = gather.encode(total, 0)
    got = torch.full_like(expected, 77)
    reduce.requantize(packets, gather, got)
    assert torch.equal(got, expected)
    reduce.requantize_feedback(packets, gather, got, None)
    assert torch.equal(got, expected)

    generator = torch.Generator().manual_seed(1)
    owed = torch.randn(5, 200, generator=generator)
    meant = total + owed
    reduce.requantize_feedback(packets, gather, got, owed)
    assert torch.equal(got, gather.encode(meant, 0))
    missed = meant - gather.decode(got, 0)
    assert torch.equal(owed.nan_to_num(), missed.nan_to_num())

    kept = torch.randn(5, 200, generator=generator)
    meant = message.partials[1].float() + kept
    reduce.encode_feedback(message.partials[1], 1, packets[1], None, kept)
    assert torch.equal(packets[1], reduce.encode(meant, 1))
    assert torch.equal(kept.nan_to_num(), (meant - reduce.decode(packets[1], 1)).nan_to_num())

    residual = torch.randn(5, 200, generator=generator)
    added = residual + gather.decode(got, 0)
    gather.decode_foretold(got, 0, residual, None)
    assert same_bits(residual, torch.where(added.isnan(), torch.nan, added))


def test_outliers_travel_as_they_are():
    wire, hidden = WireFormat(4, 16, 64, rotation="full"), 130
    outliers = torch.tensor([7, 100])
    codec = make_codec(wire, hidden, get_backend("torch"), None, outliers)
    x = torch.randn(3, hidden, generator=torch.Generator().manual_seed(0))
    quiet = codec.decode(codec.encode(x, 0), 0)
    x[0, 7], x[1, 100], x[2, 7] = 1e30, torch.nan, -torch.inf
    got = codec.decode(codec.encode(x, 0), 0)
    assert torch.equal(got[:, outliers].nan_to_num(), x[:, outliers].bfloat16().float().nan_to_num())
    body = [feature for feature in range(hidden) if feature not in outliers]
    assert torch.equal(got[:, body], quiet[:, body])  # nothing of them is mixed into the others


def test_what_is_not_finite_surfaces_wherever_it_is_mixed():
    codec = make_codec(WireFormat(4, 8, rotation=16), 40, get_backend("torch"))
    x = torch.ones(2, 40)
    x[0, 20], x[1, 39] = torch.inf, torch.nan
    got = codec.decode(codec.encode(x, 0), 0)
    assert got[0].isnan().nonzero().flatten().tolist() == [*range(16, 32)]
    assert got[1].isnan().nonzero().flatten().tolist() == [*range(32, 40)]
    assert (got[got.isnan()].view(torch.int32) == 0x7FC00000).all()


def test_saturation_counts_what_it_is_given():
    counter = SaturationCounter()
    codec = make_codec(WireFormat(4, 64, rotation="full"), 8, get_backend("torch"), saturation=counter)
    codec.encode(torch.tensor([[1e30, -1e30, 0, 1, 2, 3, float("nan"), float("inf")]]), sender=0)
    assert (counter.values, counter.saturated, counter.non_finite) == (8, 0, 2)


# ---- what they are for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2, 32, "full"])
@pytest.mark.parametrize("hidden", [128, 320, 577])
def test_errors_stay_within_the_steps(block, hidden):
    """Lengths survive a rotation: an error's square sum is at most that of the steps of the rotated groups."""
    x = torch.randn(64, hidden, generator=torch.Generator().manual_seed(hidden)) * torch.linspace(0.1, 3, hidden)
    codec = make_codec(WireFormat(8, 32, rotation=block), hidden, get_backend("torch"))
    error = (codec.decode(codec.encode(x, 0), 0) - x).double().square().sum(dim=1)
    turned = x.clone()
    rotate(turned, Rotation(hidden, block))
    half_steps = [group.double().abs().amax(dim=1) / 127 / 2 for group in turned.split(32, dim=1)]
    # the scale is rounded to bf16; rotating there and back rounds by about 2^-20 of the length
    sizes = [min(32, hidden - start) for start in range(0, hidden, 32)]
    bound = sum(size * (1.004 * step) ** 2 for size, step in zip(sizes, half_steps, strict=True))
    assert (error.sqrt() <= bound.sqrt() + 2.0**-20 * x.double().norm(dim=1)).all()
    assert (error > bound / 30).all()  # rounding errors are even within a step: a third of its square is usual


def test_rows_with_a_few_wide_features_lose_less():
    """One feature in 50 is 30 times as wide as the others: its group's step is too, unless all groups share it."""
    generator = torch.Generator().manual_seed(3)
    width = torch.where(torch.rand(1024, generator=generator) < 0.02, 30.0, 1.0)
    partials = torch.randn(2, 100, 1024, generator=generator) * width
    exact = partials.double().sum(dim=0)

    def error(name: str) -> float:
        collective = build_all_reduce(ParallelContext.virtual_ranks(2), parse_scheme(name), 1024, NO_CONSTANTS)
        return float((collective(partials) - exact).square().sum() / exact.square().sum())

    plain = error("int4-g64")
    assert error("int4-g64-rotated") < plain / 1.3
    assert error("int4-g64-hadamard1024") < plain / 1.3


def test_other_formats_have_the_codec_they_had():
    assert type(make_codec(WireFormat(4, 64), 128, get_backend("torch"))) is Codec
