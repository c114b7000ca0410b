"""Trellis-coded values: the best of all code sequences, the codes a row is read by, and what they gain."""

from __future__ import annotations

import itertools

import pytest
import torch

from lowbit_kernels import reference
from lowbit_kernels.codebooks import levels
from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.reference_trellis import trellis_codes, trellis_places


def values_of(codes, bits, size):
    return torch.tensor(levels("tc", bits))[trellis_places(codes, size)]


@pytest.mark.parametrize(("bits", "size"), [(2, 6), (3, 4), (4, 3)])
def test_codes_are_the_best_of_all(bits, size):
    """No sequence of codes is nearer to a group than the one that is found."""
    x = torch.rand(200, size, generator=torch.Generator().manual_seed(bits)) * 2 - 1
    every = torch.tensor(list(itertools.product(range(2**bits), repeat=size)), dtype=torch.int32)
    errors = torch.cdist(x.double(), values_of(every, bits, size).double()).square()
    found = trellis_codes(x, levels("tc", bits))
    error = (values_of(found, bits, size).double() - x.double()).square().sum(1)
    assert torch.allclose(error, errors.amin(1), atol=1e-9)
    assert int(found.min()) >= 0 and int(found.max()) < 2**bits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_level_can_be_reached_and_every_code_is_read(bits):
    codes = torch.randint(2**bits, (500, 40), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    places = trellis_places(codes, 20)
    assert set(places.unique().tolist()) == set(range(2 ** (bits + 1)))
    # a group does not know the one before it
    assert torch.equal(places[:, 20:], trellis_places(codes[:, 20:], 20))
    # what a group's first code stands for is what it does behind codes of 0
    assert torch.equal(places[:, 0], (codes[:, 0] >> 1) * 4 + 2 * (codes[:, 0] & 1))


@pytest.mark.parametrize("features", [64, 70, 129, 5])
def test_a_row_is_its_groups(features):
    """The last group may be short; what is left of others is not in it."""
    layout = PacketLayout(features, 3, 64, values="tc")
    x_TH = torch.randn(3, features, generator=torch.Generator().manual_seed(features))
    packet_TB, out_TH = torch.empty(3, layout.row_nbytes, dtype=torch.uint8), torch.empty(3, features)
    reference.encode(x_TH, layout, packet_TB)
    reference.decode(packet_TB, layout, out_TH)
    for start in range(0, features, 64):
        part = x_TH[:, start : start + 64]
        alone = PacketLayout(part.shape[1], 3, 64, values="tc")
        packet, out = torch.empty(3, alone.row_nbytes, dtype=torch.uint8), torch.empty_like(part)
        reference.encode(part, alone, packet)
        reference.decode(packet, alone, out)
        assert torch.equal(out, out_TH[:, start : start + 64])


@pytest.mark.parametrize(("bits", "gain"), [(2, 1.2), (3, 1.2), (4, 1.2)])
def test_it_loses_less_than_the_levels_of_as_many_bits(bits, gain):
    """In decibels, on values that spread like a normal distribution; without a trellis it would be 0."""
    x_TH = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    errors = {}
    for values in ("lm", "tc"):
        layout = PacketLayout(512, bits, 64, values=values)
        packet_TB, out_TH = torch.empty(64, layout.row_nbytes, dtype=torch.uint8), torch.empty_like(x_TH)
        reference.encode(x_TH, layout, packet_TB)
        reference.decode(packet_TB, layout, out_TH)
        errors[values] = (out_TH - x_TH).double().square().sum()
    assert 10 * torch.log10(errors["lm"] / errors["tc"]) > gain
