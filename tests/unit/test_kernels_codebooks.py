"""Code books: what their numbers must be, and what codes, ties and scales follow from them on every backend."""

from __future__ import annotations

import math
import struct
from itertools import pairwise

import pytest
import torch

from lowbit_kernels import PacketLayout, get_backend
from lowbit_kernels.codebooks import levels, thresholds
from lowbit_kernels.layout import CODE_BITS, CODE_BOOKS

ALL_BOOKS = [(values, bits) for values in CODE_BOOKS for bits in CODE_BITS[values]]
#: Those whose codes stand for a level each, whatever is beside them: a trellis's are in test_trellis.py.
BOOKS = [(values, bits) for values, bits in ALL_BOOKS if values != "tc"]


@pytest.fixture(params=["torch", "cpu"])
def backend(request):
    try:
        return get_backend(request.param)
    except ValueError as error:
        pytest.skip(str(error))


def coded(backend, layout, x_TH):
    packet_TB = torch.full((len(x_TH), layout.row_nbytes), 0xAA, dtype=torch.uint8)
    backend.encode(x_TH, layout, packet_TB)
    return packet_TB


def decoded(backend, layout, packet_TB):
    out_TH = torch.full((len(packet_TB), layout.features), math.nan)
    backend.decode(packet_TB, layout, out_TH)
    return out_TH


def arrived(backend, layout, x_TH):
    return decoded(backend, layout, coded(backend, layout, x_TH))


def scale_bits(layout, packet_TB):
    start = layout.scales_offset
    return [int.from_bytes(bytes(row[start : start + 2].tolist()), "little") for row in packet_TB]


@pytest.mark.parametrize(("values", "bits"), ALL_BOOKS)
def test_levels_are_what_everything_counts_on(values, bits):
    table = levels(values, bits)
    assert len(table) == 2 ** (bits + (values == "tc")) and table[0] == -1.0 and max(table) <= 1.0
    assert list(table) == sorted(set(table))
    # exact in fp32 when multiplied: no more bits than bf16 has
    packed = [struct.pack("<f", level) for level in table]
    assert [struct.unpack("<f", level)[0] for level in packed] == list(table)
    assert all(level[:2] == b"\0\0" for level in packed)
    middles = [(low + high) / 2 for low, high in pairwise(table)]
    assert list(thresholds(values, bits)) == middles


@pytest.mark.parametrize(("values", "bits"), BOOKS)
def test_levels_have_the_fast_way_of_avx512(values, bits):
    """csrc/avx512_levels.h: thresholds in whole units of 2^-15, at most one in each cell of 2^-4."""
    units = [threshold * 2**15 for threshold in thresholds(values, bits)]
    assert all(unit == int(unit) and -32767 <= unit <= 32766 for unit in units)
    assert len({int(unit) // 2048 for unit in units}) == len(units)


def test_nf4_is_the_published_one_in_bf16():
    # the ends, 0, and the level beside it: 0.0795803 is 162.98 / 2048, in bf16 163 / 2048
    table = levels("nf4", 4)
    assert (table[0], table[7], table[8], table[15]) == (-1.0, 0.0, 163 / 2048, 1.0)
    assert levels("int", 4) == thresholds("e2m1", 4) == ()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("values", "bits"), BOOKS)
def test_levels_come_back_and_ties_go_down(backend, values, bits, sign):
    """A row of all levels, then of ties, then of what is just above and below them, at a scale that is exact."""
    scale = sign * 2.0 if values == "lm" else 2.0
    table = torch.tensor(levels(values, bits))
    ties = torch.tensor(thresholds(values, bits))
    above, below = (torch.nextafter(ties, torch.tensor(side)) for side in (2.0, -2.0))
    # the first value is the group's largest, and level 0; a code book without 1 has nothing else of its magnitude
    first = torch.tensor([-1.0])
    rows = [torch.cat((first, part)) for part in (table[1:], ties, above, below)]
    expected = [torch.cat((first, part)) for part in (table[1:], table[:-1], table[1:], table[:-1])]
    layout = PacketLayout(2**bits, bits, 2**bits, values=values)
    x_TH, expected_TH = torch.stack(rows) * scale, torch.stack(expected) * scale
    packet_TB = coded(backend, layout, x_TH)
    assert set(scale_bits(layout, packet_TB)) == {0x4000 if scale > 0 else 0xC000}
    got_TH = decoded(backend, layout, packet_TB)
    assert torch.equal(got_TH, expected_TH), (got_TH - expected_TH).abs().max()


@pytest.mark.parametrize(("values", "bits"), BOOKS)
def test_groups_by_hand(backend, values, bits):
    table = levels(values, bits)
    zero = min(table, key=abs)  # nearest level to 0, and no tie in these books
    layout = PacketLayout(6, bits, 2, values=values)
    # a tie of magnitudes: of "lm" the positive one becomes -1, the other the last level; of "nf4" both are levels.
    # Infinity: the group is lost. All 0: scale 2^-100
    got = arrived(backend, layout, torch.tensor([[3.0, -3.0, 1.0, -math.inf, 0.0, -0.0]]))[0].tolist()
    assert got[:2] == ([3.0, -3.0 * table[-1]] if values == "lm" else [3.0, -3.0])
    assert all(map(math.isnan, got[2:4])) and got[4:] == [zero * 2.0**-100] * 2
    packet_TB = coded(backend, layout, torch.tensor([[3.0, -3.0, 1.0, math.nan, 0.0, -0.0]]))
    start = layout.scales_offset
    assert bytes(packet_TB[0, start + 2 :].tolist()) == b"\xc0\x7f\x80\x0d"  # NaN, 2^-100
    # beyond bf16 a scale is infinite, and what arrives is not finite either
    got = arrived(backend, layout, torch.tensor([[3.4e38, 1.0, -3.4e38, 1.0, -3.38e38, 1.0]]))[0]
    assert not got[:4].isfinite().any() and got[4:].isfinite().all()


def test_a_scale_for_all_of_a_row(backend):
    """One group as wide as the row is, at widths of all kinds: as many values, and no more scales."""
    for width in (1, 7, 64, 100, 576, 4100):
        x_TH = torch.randn(3, width, generator=torch.Generator().manual_seed(width))
        layout = PacketLayout(width, 4, width, values="nf4")
        assert layout.groups == 1
        packet_TB = coded(backend, layout, x_TH)
        peak = x_TH.abs().amax(dim=1).bfloat16().view(torch.int16).tolist()
        assert scale_bits(layout, packet_TB) == peak
        assert (decoded(backend, layout, packet_TB) - x_TH).abs().max() < 0.16 * x_TH.abs().max()
