"""Packets of mixed features: compiled C, on each of its ways, has the bits of its definition in torch."""

import random
from typing import cast

import pytest
import torch
from helpers.messages import random_values, same_bits

from lowbit_kernels import Backend, PacketLayout, get_backend, reference
from lowbit_kernels.mixed import Composed, Mixing, get_mixed
from lowbit_kernels.rotation import Rotation

DEFINITION = Composed(cast(Backend, reference))


@pytest.fixture(params=["fastest C", "plain C", "triton on cuda"])
def way(request):
    device = "cuda" if request.param == "triton on cuda" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    try:
        found = get_mixed(get_backend("cpu" if device == "cpu" else "triton", device))
    except ValueError as error:
        pytest.skip(str(error))
    if device == "cuda":
        yield found, device
        return
    from lowbit_kernels.cpu_library import library

    library().lowbit_only_plain(request.param == "plain C")
    yield found, device
    library().lowbit_only_plain(0)


def drawn(seed):
    """A layout and how its rows are mixed, and values: as partials come, with everything that is special."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    hidden = rng.choice([1, 5, 16, 67, 130, 256, 577, 1031])
    outliers = rng.choice([0, 1, hidden // 9, hidden])
    options = rng.choice([
        *({"bits": 4}, {"bits": 3}, {"bits": 8}, {"bits": 4, "scale_format": "e4m3"}, {"bits": 5, "asymmetric": True}),
        {"bits": 3, "values": "tc"},
    ])  # fmt: skip
    layout = PacketLayout(hidden + outliers, group_size=rng.choice([16, 40, 64]), outliers=outliers, **options)
    factor_H = (torch.randn(hidden, generator=generator).exp()).bfloat16().float() if rng.random() < 0.5 else None
    index = torch.randperm(hidden, generator=generator)[:outliers].sort().values if outliers else None
    mixing = Mixing(Rotation(hidden, rng.choice(["full", 2, 16, 128])), factor_H, index)
    magnitude = rng.choice([1.0, 1e4, 1e37, 1e-41])
    dtype = rng.choice([torch.float32, torch.bfloat16])
    values = random_values((3, 4, hidden + 2), generator, magnitude, rng.choice([0, 0, 0.02]))[..., :hidden].to(dtype)
    return layout, mixing, values


def on(device, mixing):
    sides = (None if side is None else side.to(device) for side in (mixing.factor_H, mixing.outlier_index))
    return Mixing(mixing.rotation, *sides)


def test_bits_are_those_of_the_definition(way):
    found, device = way
    for seed in range(120):
        layout, mixing, values = drawn(seed)
        there, packets = on(device, mixing), []
        for x_TH in values:
            expected = torch.full((4, layout.row_nbytes), 9, dtype=torch.uint8)
            got = torch.full((4, layout.row_nbytes + 6), 7, dtype=torch.uint8, device=device)
            DEFINITION.encode_mixed(x_TH, layout, expected, mixing)
            found.encode_mixed(x_TH.to(device), layout, got[:, : layout.row_nbytes], there)
            assert torch.equal(got[:, : layout.row_nbytes].cpu(), expected), (seed, layout, mixing.rotation)
            assert (got[:, layout.row_nbytes :] == 7).all(), "wrote behind a row"
            packets.append(expected)
        hidden = mixing.rotation.features
        for count, add in ((1, False), (1, True), (3, False), (2, True)):
            expected = torch.randn(4, hidden, generator=torch.Generator().manual_seed(seed))
            got = torch.full((4, hidden + 3), 7.0, device=device)
            got[:, :hidden] = expected.to(device)
            DEFINITION.decode_mixed(packets[:count], layout, expected, mixing, add)
            some = [packet_TB.to(device) for packet_TB in packets[:count]]
            found.decode_mixed(torch.stack(some) if add else some, layout, got[:, :hidden], there, add)
            assert same_bits(got[:, :hidden].cpu(), expected), (seed, layout, mixing.rotation, count, add)
            assert (got[:, hidden:] == 7.0).all(), "wrote behind a row"


def test_no_rows(way):
    found, device = way
    layout, mixing = PacketLayout(65, 4, 16, outliers=1), Mixing(Rotation(64, 8), None, torch.tensor([3]))
    packet_TB = torch.empty(0, layout.row_nbytes, dtype=torch.uint8, device=device)
    found.encode_mixed(torch.empty(0, 64, device=device), layout, packet_TB, on(device, mixing))
    found.decode_mixed([packet_TB], layout, torch.empty(0, 64, device=device), on(device, mixing))


@pytest.mark.parametrize("mixed", ["torch", "cpu"])
def test_what_does_not_fit_is_refused(mixed):
    try:
        found = get_mixed(get_backend(mixed))
    except ValueError as error:
        pytest.skip(str(error))
    layout, mixing = PacketLayout(65, 4, 16, outliers=1), Mixing(Rotation(64, 8), None, torch.tensor([3]))
    packet_TB, x_TH = torch.empty(2, layout.row_nbytes, dtype=torch.uint8), torch.zeros(2, 64)
    with pytest.raises(ValueError, match="does not hold mixed rows of 64 features and 1 outliers"):
        found.encode_mixed(x_TH, PacketLayout(64, 4, 16, outliers=1), packet_TB, mixing)
    with pytest.raises(ValueError, match="no static scales"):
        found.encode_mixed(x_TH, PacketLayout(65, 4, outliers=1), packet_TB, mixing)
    with pytest.raises(ValueError, match=r"x_TH is torch.float32 \(2, 63\)"):
        found.encode_mixed(x_TH[:, 1:], layout, packet_TB, mixing)
    with pytest.raises(ValueError, match=r"out_TH is torch\.bfloat16"):
        found.decode_mixed([packet_TB], layout, x_TH.bfloat16(), mixing)
    with pytest.raises(ValueError, match="must be adjacent"):
        found.decode_mixed([packet_TB], layout, torch.zeros(64, 2).T, mixing)
    with pytest.raises(ValueError, match="packet"):
        found.encode_mixed(x_TH, layout, packet_TB[:1], mixing)
    with pytest.raises(ValueError, match="packet"):
        found.decode_mixed([packet_TB, packet_TB[:, 1:]], layout, x_TH, mixing)
    with pytest.raises(ValueError, match=r"a factor or index is torch\.float32"):
        found.encode_mixed(x_TH, layout, packet_TB, Mixing(Rotation(64, 8), torch.ones(63), torch.tensor([3])))


@pytest.mark.parametrize("bad", [[3, 2], [2, 2], [-1, 2], [2, 64]])
def test_a_bad_outlier_index_is_refused(bad):
    try:
        found = get_mixed(get_backend("cpu"))
    except ValueError as error:
        pytest.skip(str(error))
    layout, mixing = PacketLayout(66, 4, 16, outliers=2), Mixing(Rotation(64, 8), None, torch.tensor(bad))
    packet_TB = torch.zeros(1, layout.row_nbytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="ascending"):
        found.encode_mixed(torch.zeros(1, 64), layout, packet_TB, mixing)
    with pytest.raises(ValueError, match="ascending"):
        found.decode_mixed([packet_TB], layout, torch.zeros(1, 64), mixing)
