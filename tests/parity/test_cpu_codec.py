"""The compiled codec takes several ways through its code; all give the bits of `reference.py`.

Which way depends on the processor, on the layout and on the values: `test_kernels_parity.py` sees the ways of this
machine at random, the tests here make sure of each.
"""

import ctypes
import mmap
import random
import sys

import pytest
import torch
from helpers.kernel_cases import FAMILIES, Case, check_case, check_ties, same_bits

from lowbit_kernels import PacketLayout, codebooks, get_backend, reference

CODES = [family for family in FAMILIES if family not in ("bf16", "fp32")]
GROUPS = [16, 32, 64, 128, 192, 48]  # each of the first five has loops of its own, the last takes those of any size


@pytest.fixture
def codec():
    try:
        return get_backend("cpu")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["fastest", "plain C"])
def way(request, codec):
    """The codec on the fastest way of this processor, and on the one that every processor has."""
    from lowbit_kernels.cpu_library import library

    library().lowbit_only_plain(request.param == "plain C")
    assert not (request.param == "plain C" and library().lowbit_uses_avx512())
    yield codec
    library().lowbit_only_plain(0)


def gather_case(case, seed):
    family = random.Random(seed).choice(list(FAMILIES))
    return Case(seed, family, features=case.layout.features, tokens=case.tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_layouts(way, family):
    for seed in range(1000, 1040):
        case = Case(seed, family)
        check_case(case, way, "cpu", gather_case(case, seed))


def check_layout(codec, seed, family, **options):
    case = Case(seed, family, features=options["features"], tokens=3)
    case.use_layout(PacketLayout(**options))
    check_case(case, codec, "cpu", gather_case(case, seed))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asymmetric", [False, True])
def test_every_width_and_group(way, bits, asymmetric):
    """With and without outliers, in whole blocks of features and in part of one."""
    for seed, group_size in enumerate([0, *GROUPS]):
        for features, outliers in ((512, 0), (512, 8), (463, 0), (463, 40)):
            options = {"bits": bits, "group_size": group_size, "asymmetric": asymmetric}
            check_layout(way, seed, "int4", features=features, outliers=outliers, **options)


@pytest.mark.parametrize("scale_format", ["bf16", "e4m3", "e8m0"])
@pytest.mark.parametrize("prescaled", [False, True])
def test_every_small_float_and_group(way, scale_format, prescaled):
    for seed, group_size in enumerate(GROUPS):
        for bits, values in ((8, "e4m3"), (4, "e2m1"), (4, "int"), (8, "int")):
            options = {"bits": bits, "values": values, "group_size": group_size, "prescaled": prescaled}
            for outliers in (0, 21):
                check_layout(way, seed, "int4", features=463, outliers=outliers, scale_format=scale_format, **options)


LEVELS = [("lm", 2), ("lm", 3), ("lm", 4), ("nf4", 4), ("tc", 2), ("tc", 3), ("tc", 4)]


@pytest.mark.parametrize(("values", "bits"), LEVELS)
@pytest.mark.parametrize("prescaled", [False, True])
def test_every_code_book_and_group(way, values, bits, prescaled):
    for seed, group_size in enumerate([*GROUPS, 40, 463]):
        for scale_format in ("bf16", "e4m3"):
            for features, outliers in ((512, 0), (463, 21)):
                options = {"bits": bits, "values": values, "group_size": group_size, "scale_format": scale_format}
                check_layout(way, seed, "int4", features=features, outliers=outliers, prescaled=prescaled, **options)


def test_ties_of_levels(way):
    check_ties(way, "cpu")


#: Levels on no grid, thresholds at 0, and several in one cell of csrc/avx512_levels.h: two of these take the plain way.
OTHER_LEVELS = {
    "on no grid": (-1.0, -0.001953125 * 1.0078125, 0.5, 1.0),
    "tie at zero": (-1.0, -0.25, 0.25, 1.0),
    "dense": (-1.0, -0.03125, 0.0, 0.03125),
}


@pytest.mark.parametrize("name", OTHER_LEVELS)
def test_code_books_of_other_numbers(way, monkeypatch, name):
    """Whether they have a fast way or not."""
    from lowbit_kernels.cpu_library import c_layout

    caches = codebooks.levels, codebooks.thresholds, c_layout
    monkeypatch.setitem(codebooks._LEVELS, ("lm", 2), OTHER_LEVELS[name])
    for cached in caches:
        cached.cache_clear()
    try:
        for seed in range(12):
            for group_size in (32, 40):
                check_layout(way, seed, "int4", features=200, bits=2, values="lm", group_size=group_size)
        layout = PacketLayout(64, 2, 64, values="lm")
        x_TH = torch.tensor([[1e-45, -1e-45, 1e-40, -0.0] * 16, [0.0, 1e-38, -1e-38, 1e-30] * 16]) * 3
        for largest in (1.5, -3e38, 1e-3):
            x_TH[:, 5] = largest
            got, expected = (torch.empty(2, layout.row_nbytes, dtype=torch.uint8) for _ in range(2))
            way.encode(x_TH, layout, got)
            reference.encode(x_TH, layout, expected)
            assert torch.equal(got, expected), largest
    finally:
        monkeypatch.undo()
        for cached in caches:
            cached.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", ["lm", "nf4", "tc"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 100])
def test_one_value_of_a_code_book_that_is_not_finite(way, dtype, values, group_size):
    layout = PacketLayout(200, 4, group_size, values=values)
    ordinary = torch.randn(200, 200, generator=torch.Generator().manual_seed(1)).to(dtype)
    for special in (torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max, torch.finfo(dtype).min):
        x_TH = ordinary.clone().fill_diagonal_(special)
        got = torch.empty(200, layout.row_nbytes, dtype=torch.uint8)
        expected = torch.empty_like(got)
        way.encode(x_TH, layout, got)
        reference.encode(x_TH, layout, expected)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [0, 16, 32, 64, 100])
def test_one_value_that_is_not_finite(way, dtype, group_size):
    """Wherever it lies: rows without one take a shorter way, and may not overlook it."""
    layout = PacketLayout(200, 4, group_size)
    inverse = None if group_size else torch.full((200,), 3.0)
    ordinary = torch.randn(200, 200, generator=torch.Generator().manual_seed(1)).to(dtype)
    for special in (torch.nan, torch.inf, -torch.inf):
        x_TH = ordinary.clone().fill_diagonal_(special)
        got = torch.empty(200, layout.row_nbytes, dtype=torch.uint8)
        expected = torch.empty_like(got)
        way.encode(x_TH, layout, got, inverse)
        reference.encode(x_TH, layout, expected, inverse)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_values_far_beyond_the_largest_code(way, bits):
    """Products beyond 16 and 32 bits, infinite ones included, saturate like any other."""
    layout = PacketLayout(130, bits)
    sizes = torch.logspace(0, 38, 65)
    x_TH = torch.stack((torch.cat((sizes, -sizes)), torch.cat((-sizes, sizes / 3))))
    for inverse_scale in (1.0, 2.0**20, 2.0**-3):
        inverse = torch.full((130,), inverse_scale)
        got = torch.empty(2, layout.row_nbytes, dtype=torch.uint8)
        expected = torch.empty_like(got)
        way.encode(x_TH, layout, got, inverse)
        reference.encode(x_TH, layout, expected, inverse)
        assert torch.equal(got, expected)


def test_static_scales_that_bf16_does_not_hold(way):
    """Nobody should send them, but then the codes still mean code * scale."""
    layout = PacketLayout(130, 4, 0, 3)
    case = Case(5, "int4", features=130, tokens=2)
    case.use_layout(layout)
    case.scale_RH = torch.rand(case.ranks, layout.body, generator=case.generator) + 0.1
    packet_TB = case.random_packet()
    assert same_bits(case.decoded(way, packet_TB, "cpu"), case.decoded(reference, packet_TB, "cpu"))


def at_the_end(tensor):
    """A copy of `tensor` at the end of a page that is followed by one nobody may touch."""
    if tensor is None:
        return None
    nbytes = tensor.numel() * tensor.element_size()
    readable = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = torch.frombuffer(mmap.mmap(-1, readable + mmap.PAGESIZE), dtype=torch.uint8)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(pages.data_ptr() + readable), mmap.PAGESIZE, 0) == 0
    copy = pages[readable - nbytes : readable].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


@pytest.mark.skipif(sys.platform != "linux", reason="guards pages with mprotect")
def test_nothing_beyond_a_row_is_touched(way):
    """Any access behind the last row would end the process."""
    for seed in range(60):
        case = Case(seed, random.Random(seed).choice(CODES), tokens=2)
        if case.layout.body == 0:
            continue
        inverse = None if case.inverse_RH is None else at_the_end(case.inverse_RH[0])
        scale = None if case.scale_RH is None else at_the_end(case.scale_RH[0])
        minimum = at_the_end(case.minimum())
        body_index, outlier_index = at_the_end(case.body_index), at_the_end(case.outlier_index)
        x_TH = at_the_end(case.values())
        packet_TB = at_the_end(torch.empty(2, case.layout.row_nbytes, dtype=torch.uint8))
        out_TH = at_the_end(torch.empty(x_TH.shape))
        way.encode(x_TH, case.layout, packet_TB, inverse, body_index, outlier_index, minimum)
        expected = torch.empty(packet_TB.shape, dtype=torch.uint8)
        reference.encode(x_TH, case.layout, expected, inverse, body_index, outlier_index, minimum)
        assert torch.equal(packet_TB, expected)
        way.decode(packet_TB, case.layout, out_TH, scale, body_index, outlier_index, minimum)
        way.decode(packet_TB, case.layout, out_TH, scale, body_index, outlier_index, minimum, add=True)


@pytest.mark.parametrize("bad", [[3, 2], [2, 2], [-1, 2], [2, 64]])
def test_a_bad_outlier_index_is_refused(codec, bad):
    layout = PacketLayout(64, 4, 16, 2)
    index = torch.tensor(bad)
    body_index = torch.arange(62)
    packet_TB = torch.zeros(1, layout.row_nbytes, dtype=torch.uint8)
    out_TH = torch.zeros(1, 64)
    with pytest.raises(ValueError, match="ascending"):
        codec.encode(out_TH, layout, packet_TB, None, body_index, index)
    with pytest.raises(ValueError, match="ascending"):
        codec.decode(packet_TB, layout, out_TH, None, body_index, index)
    with pytest.raises(ValueError, match="ascending"):
        to_TB = torch.zeros(1, 128, dtype=torch.uint8)
        codec.requantize([packet_TB], layout, to_TB, PacketLayout(64, 16), None, body_index, index)
    good = torch.tensor([2, 3])
    with pytest.raises(ValueError, match="ascending"):
        codec.requantize(
            [packet_TB], layout, packet_TB, layout, None, body_index, good,
            gather_body_index=body_index, gather_outlier_index=index,
        )  # fmt: skip
