"""What foretells and closes the loop in compiled C has the bits of `foretell.Composed` over the reference codec."""

import math
import random

import pytest
import torch
from helpers.kernel_cases import FAMILIES, Case, first_difference, same_bits

from lowbit_kernels import PacketLayout, get_backend, reference
from lowbit_kernels.foretell import Coefficients, Composed, Share, get_feedback

COMPOSED = Composed(reference)
FEATURES = [1, 15, 16, 67, 130, 515]


@pytest.fixture(params=["fastest", "plain C"])
def way(request):
    """Compiled C on the fastest way of this processor, and on the one that every processor has."""
    try:
        feedback = get_feedback(get_backend("cpu"))
    except ValueError as error:
        pytest.skip(str(error))
    from lowbit_kernels.cpu_library import library

    assert not isinstance(feedback, Composed)
    library().lowbit_only_plain(request.param == "plain C")
    yield feedback
    library().lowbit_only_plain(0)


def same(got, expected, what):
    """NaN that stays with an encoder may have any bits."""
    got, expected = got.nan_to_num(nan=math.pi), expected.nan_to_num(nan=math.pi)
    assert same_bits(got, expected), f"{what}: {first_difference(got, expected)}"


def whole(case, shape, largest, dtype):
    return torch.randint(-largest, largest + 1, shape, generator=case.generator).to(dtype)


def draw_share(case, tokens, features, width=None, dtype=None):
    """Codes and coefficients up to the largest, so that a sum that saturates or wraps shows."""
    width = width or case.rng.choice([1, 2, 3, 4, 7, 16, 32, 33])
    dtype = dtype or case.rng.choice([torch.int8, torch.int16])
    largest = 127 if dtype is torch.int8 else 127 * 8
    values = whole(case, (width, features), largest, dtype)
    values[:, ::3] = largest
    codes = whole(case, (tokens, width + 2), 127, torch.int8)[:, :width]
    if case.rng.random() < 0.3:
        codes = torch.full_like(codes, case.rng.choice([127, -127]))
    scale = torch.rand(features, generator=case.generator) * case.rng.choice([1e-5, 1.0, 1e30])
    return Share(codes, Coefficients(values), scale)


def statics(case, rank=0):
    pick = [None if of_ranks is None else of_ranks[rank] for of_ranks in (case.inverse_RH, case.scale_RH)]
    return [*pick, case.body_index, case.outlier_index, case.minimum(rank)]


def check_encode(feedback, case, share, has_missed):
    x_TH = case.values()
    missed = case.apart(torch.randn(x_TH.shape, generator=case.generator), "cpu") if has_missed else None
    results = []
    for module in (COMPOSED, feedback):
        packet_TB = case.strided((case.tokens, case.layout.row_nbytes), torch.uint8, 0xAA, "cpu")
        left = None if missed is None else missed.clone() if missed.is_contiguous() else case.apart(missed, "cpu")
        module.encode_feedback(x_TH, case.layout, packet_TB, share, left, *statics(case))
        results.append((packet_TB, left))
    (expected, left_expected), (got, left) = results
    assert same_bits(got, expected), f"packet {case.layout}: {first_difference(got, expected)}"
    if has_missed:
        same(left, left_expected, f"missed {case.layout}")
    return expected


def check_all(feedback, case, gather, share):
    for has_share, has_missed in ((True, False), (False, True), (True, True)):
        packet_TB = check_encode(feedback, case, share if has_share else None, has_missed)
    base_TH = case.values().float()
    results = []
    for module in (COMPOSED, feedback):
        out_TH = case.apart(base_TH, "cpu")
        static = statics(case)[1:]
        module.decode_foretold(packet_TB, case.layout, out_TH, share, *static)
        results.append(out_TH)
    assert same_bits(results[1], results[0]), f"residual {case.layout}: {first_difference(results[1], results[0])}"

    packets = [case.encoded(reference, case.values(), rank, "cpu") for rank in range(case.ranks)]
    owed = torch.randn(base_TH.shape, generator=case.generator)
    results = []
    names = ("inverse_scale", "scale", "body_index", "outlier_index", "minimum")
    to = {f"gather_{name}": value for name, value in zip(names, statics(gather), strict=True)}
    for module in (COMPOSED, feedback):
        to_TB = case.strided((case.tokens, gather.layout.row_nbytes), torch.uint8, 0xAA, "cpu")
        left = case.apart(owed, "cpu")
        arguments = [case.scale_RH, case.body_index, case.outlier_index, case.minimum_RH]
        module.requantize_feedback(packets, case.layout, to_TB, gather.layout, left, *arguments, **to)
        results.append((to_TB, left))
    (expected, left_expected), (got, left) = results
    assert same_bits(got, expected), f"sum {gather.layout}: {first_difference(got, expected)}"
    same(left, left_expected, f"owed {gather.layout}")


@pytest.mark.parametrize("family", FAMILIES)
def test_random_layouts(way, family):
    """Rows that fill no block, one block, and more; values that are not finite among them."""
    for seed in range(12):
        case = Case(seed, family, tokens=[0, 1, 3, 8, 13][seed % 5])
        gather = Case(seed, random.Random(seed).choice(list(FAMILIES)), case.layout.features, case.tokens)
        check_all(way, case, gather, draw_share(case, case.tokens, case.layout.features))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
@pytest.mark.parametrize("features", FEATURES)
def test_products_of_every_width(way, dtype, features):
    """Packet values of 32 bits: what comes out of a decode into zeros is what was foretold, in Python's numbers."""
    case = Case(features, "fp32", features, 9)
    packet_TB = torch.zeros(9, case.layout.row_nbytes, dtype=torch.uint8)
    for width in range(1, 37):
        share = draw_share(case, 9, features, width, dtype)
        out_TH = torch.zeros(9, features)
        way.decode_foretold(packet_TB, case.layout, out_TH, share)
        sums = share.codes_TK.to(torch.int64) @ share.coefficients.values_IO.to(torch.int64)
        # adding to zero turns -0 into 0
        assert same_bits(out_TH, sums.float() * share.scale_H + 0.0), (features, width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [*FEATURES, 4100])
def test_codes_of_inputs(way, dtype, features):
    """Inputs of all sizes, on ties, beyond the largest code, and not finite."""
    case = Case(features, "fp32", features, 11)
    for width in (1, 5, 16, 32, 37):
        input_TH = (torch.randn(11, features + 3, generator=case.generator) * 60)[:, :features]
        input_TH[0], input_TH[1] = input_TH[0].round() + 0.5, input_TH[1] * 1e37
        input_TH[2, ::7], input_TH[3, ::5], input_TH[4, ::3] = math.nan, math.inf, -math.inf
        input_TH = input_TH.to(dtype)
        scale_H = torch.full((features,), 1.0) if width == 5 else torch.rand(features, generator=case.generator) * 3
        # sums below 2^24, as `Predictor` demands
        first = Coefficients(whole(case, (features, width), min(127, 2**24 // (128 * features)), torch.int8))
        offset_K = whole(case, (width,), 1000, torch.float32)
        factor_K = torch.rand(width, generator=case.generator) / (30 * features**0.5)
        arguments = input_TH, scale_H, first, offset_K, factor_K
        expected = COMPOSED.foretell_codes(*arguments)
        got = way.foretell_codes(*arguments)
        assert got.dtype == torch.int8 and torch.equal(got, expected), (width, (got != expected).nonzero()[:3])
        assert features < 100 or width < 16 or expected.unique().numel() > 50  # not all at the ends


def test_what_does_not_fit_is_refused(way):
    layout = PacketLayout(64, 4, 32)
    x_TH, packet_TB = torch.zeros(2, 64), torch.zeros(2, layout.row_nbytes, dtype=torch.uint8)
    share = Share(torch.zeros(2, 3, dtype=torch.int8), Coefficients(torch.zeros(3, 64, dtype=torch.int8)), x_TH[0])
    with pytest.raises(ValueError, match=r"missed_TH is torch.float32 \(2, 63\)"):
        way.encode_feedback(x_TH, layout, packet_TB, share, torch.zeros(2, 63))
    with pytest.raises(ValueError, match=r"codes_TK is torch.int8 \(1, 3\)"):
        way.encode_feedback(x_TH, layout, packet_TB, Share(share.codes_TK[:1], *vars_of(share)), None)
    wide = Coefficients(torch.zeros(3, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match="expected int8 or int16"):
        way.decode_foretold(packet_TB, layout, x_TH, Share(share.codes_TK, wide, share.scale_H))
    with pytest.raises(ValueError, match="scale is missing"):
        static = torch.ones(64)
        way.encode_feedback(x_TH, PacketLayout(64, 4), packet_TB[:, :32], share, x_TH.clone(), static)
    with pytest.raises(TypeError, match="foretell_codes reads"):
        way.foretell_codes(x_TH.double(), x_TH[0], share.coefficients, x_TH[0], x_TH[0])


def vars_of(share):
    return share.coefficients, share.scale_H
