"""Packets of all formats: worked out by hand, drawn at random, and every code of the small floats.

What the torch reference writes and reads is compared with `helpers/golden.py`, which shares no code with the project.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import golden
from helpers.golden_messages import array
from helpers.kernel_cases import FAMILIES, Case

from lowbit_kernels import PacketLayout, get_backend, reference

NAN, INF = float("nan"), float("inf")
ONES = [1.0] * 8

# Format; static scale and minimum; values; the row; what it decodes to. Low bits are filled first.
HAND_MADE = {
    # 3 bits are planes of 2 and 1. Codes 1 = 001, -2.4 -> -2 = 110, 3.7 -> 4, clamped to 3 = 011, NaN -> -4 = 100, the
    # tie 0.5 -> 0. Low two bits 01 10 11 00 | 00: 1 + 2*4 + 3*16 = 57 = 39, then 00. High bits 0 1 0 1 0: 2 + 8 = 0A.
    "static-3": (
        golden.Format(3), ONES[:5], None, [1.0, -2.4, 3.7, NAN, 0.5], "39 00 0A 00", [1.0, -2.0, 3.0, NAN, 0.0],
    ),
    # (-1 + 1) * 2 = 0; 7.6 * 4 = 30.4 -> 30 = 11110, the largest; 1 - 2 = -1, clamped to 0; Inf -> 31 = 11111.
    # Planes of 4 and 1: nibbles 0 E 0 F are E0 F0; high bits 0 1 0 1 are 0A.
    "static-5-asymmetric": (
        golden.Format(5, asymmetric=True), [0.5, 0.25, 1.0, 1.0], [-1.0, 0.0, 2.0, 0.0],
        [-1.0, 7.6, 1.0, INF], "E0 F0 0A 00", [-1.0, 7.5, 2.0, NAN],
    ),
    # Planes of 4 and 2. [32, -1]: 32 becomes -32 = 100000, scale -1 = BF80; -1 becomes 1 = 000001.
    # [-8, 3.9]: scale 0.25 = 3E80; -32 = 100000; 15.6 -> 16 = 010000. Nibbles 0 1 0 0; pairs 10 00 10 01: 2+32+64.
    "group-6": (
        golden.Format(6, group=2), None, None, [32.0, -1.0, -8.0, 3.9],
        "10 00 62 00 80 BF 80 3E", [32.0, -1.0, -8.0, 4.0],
    ),
    # Planes of 4, 2 and 1. Scale -64 / -64 = 1 = 3F80. -64 = 1000000, 63.4 -> 63 = 0111111, 5 = 0000101, 0.
    # Nibbles 0 F 5 0: F0 05; pairs 00 11 00 00: 0C; high bits 1 0 0 0: 01.
    "group-7": (
        golden.Format(7, group=4), None, None, [-64.0, 63.4, 5.0, 0.0], "F0 05 0C 01 80 3F", [-64.0, 63.0, 5.0, 0.0],
    ),
    # Minimum 1 = 3F80; step (4 - 1) / 3 = 1 = 3F80. Codes 0, 3, 1.4 -> 1, 2.6 -> 3: 0 + 3*4 + 1*16 + 3*64 = 220 = DC.
    "group-2-asymmetric": (
        golden.Format(2, group=4, asymmetric=True), None, None, [1.0, 4.0, 2.4, 3.6],
        "DC 00 80 3F 80 3F", [1.0, 4.0, 2.0, 4.0],
    ),
    # [-0, 15]: minimum +0, step 15/15 = 1, codes 0 and F. [3] alone: minimum 3 = 4040, step 0, raised to 2^-100 = 0D80.
    # [-3.4e38, 0]: the minimum is beyond bf16, so the group is lost: scale and minimum 7FC0. Scales, then minimums.
    "group-4-asymmetric": (
        golden.Format(4, group=2, asymmetric=True), None, None, [-0.0, 15.0, -3.4e38, 0.0, 3.0],
        "F0 00 00 00 80 3F C0 7F 80 0D 00 00 C0 7F 40 40", [0.0, 15.0, NAN, NAN, 3.0],
    ),
    # e4m3 is sign, 4 bits of exponent with bias 7, 3 of mantissa. 1 = 2^(7-7): 0 0111 000 = 38. -0.3 = -1.2 * 2^-2, and
    # 1.2 is 9.6 / 8 -> 10 / 8: 1 0101 010 = AA. 500 saturates at 448 = 7E. NaN = 7F. 0.001 * 512 = 0.512 -> 1: the
    # smallest, 01. -1e-9 rounds to -0 = 80.
    "static-e4m3": (
        golden.Format(8, values="e4m3"), ONES[:6], None, [1.0, -0.3, 500.0, NAN, 0.001, -1e-9],
        "38 AA 7E 7F 01 80", [1.0, -0.3125, 448.0, NAN, 2.0**-9, -0.0],
    ),
    # e2m1 is 0 0.5 1 1.5 2 3 4 6. Ties take the even code: 0.25 -> 0; 0.75 -> 1 = 2; -2.5 -> -2 = C; 5 -> 4 = 6.
    # 9 saturates at 6 = 7; -0.1 -> +0; Inf = 8, the code of -0.
    "static-e2m1": (
        golden.Format(4, values="e2m1"), ONES[:7], None, [0.25, 0.75, -2.5, 5.0, 9.0, -0.1, INF],
        "20 6C 07 08", [0.0, 1.0, -2.0, 4.0, 6.0, 0.0, NAN],
    ),
    # Powers of two: 127/127 = 1 is one, 2^0, byte 127 = 7F; 128/127 is not, so 2, byte 80: 64 and -1.5 -> -2 = FE.
    "group-8-e8m0": (
        golden.Format(8, group=2, scales="e8m0"), None, None, [127.0, 1.0, 128.0, -3.0],
        "7F 01 40 FE 7F 80", [127.0, 1.0, 128.0, -4.0],
    ),
    # MXFP4. 12 = 1.5 * 2^3: 3 - 2 = 1, scale 2 = byte 80; 12 / 2 = 6 = 7; -0.7 / 2 = -0.35 -> -0.5 = 9. A group of one:
    # 7.9 = 1.975 * 2^2: scale 2^0 = byte 7F, and 7.9 saturates at 6 = 7. 17 bytes of codes, 2 scales at once, padding.
    "mxfp4": (
        golden.Format(4, group=32, values="e2m1", scales="e8m0"), None, None, [12.0, -0.7, *[0.0] * 30, 7.9],
        "97 " + "00 " * 15 + "07 80 7F 00", [12.0, -1.0, *[0.0] * 30, 6.0],
    ),
    # NVFP4. Steps 2688/6 = 448 and 1.5/6 = 0.25. Row scale 448/448 = 1 = 3F80. Scales 448 = 7E and 0.25 = 2^(5-7) = 28.
    # 2688/448 = 6 = 7; 1000/448 = 2.23 -> 2 = 4; -1.5/0.25 = -6 = F. 9 bytes of codes, one of padding.
    "nvfp4": (
        golden.Format(4, group=16, values="e2m1", scales="e4m3"), None, None, [2688.0, 1000.0, *[0.0] * 14, -1.5],
        "47 " + "00 " * 7 + "0F 00 80 3F 7E 28", [2688.0, 896.0, *[0.0] * 14, -1.5],
    ),
    # The first group is lost: scale 7F. The second wants 8 / -8 = -1, so the row scale is 1/448 = 1.142857 * 2^-9 ->
    # (128 + 18)/128 * 2^-9, exponent 118 = 0x76: 3B12. -1 * 448.877 saturates at -448 = FE, which is -0.998046875.
    # 8 / -0.998 = -8.02 -> -8 = 8 and -1 / -0.998 -> 1: 18.
    "group-4-e4m3": (
        golden.Format(4, group=2, scales="e4m3"), None, None, [NAN, 1.0, 8.0, -1.0],
        "00 18 12 3B 7F FE", [NAN, NAN, 7.984375, -0.998046875],
    ),
    # Scale 2 = 4000. 1 and -1 are levels 15 and 0, 0 is level 7. 0.35 lies between levels 11, 0.33791524 or in bf16
    # 173/512, and 12, 0.44070983 or 226/512, and below their middle: code B, decoded 2 * 173/512.
    "nf4": (
        golden.Format(4, group=4, values="nf4"), None, None, [2.0, -2.0, 0.0, 0.7],
        "0F B7 00 40", [2.0, -2.0, 0.0, 173 / 256],
    ),
    # 32 / 4 = 8 and -0.5 / 0.5 = -1 are grouped: scale -1 = BF80, codes -8 = 8 and 1. Decoded 8 * 4 and -1 * 0.5.
    "prescaled": (
        golden.Format(4, group=2, prescaled=True), [4.0, 0.5], None, [32.0, -0.5], "18 00 80 BF", [32.0, -0.5],
    ),
    # Values relative to 1 and 2: -3 / 1, 9 / 2 = 4.5. Minimum -3 = C040, step 7.5/15 = 0.5 = 3F00: codes 0 and 15 = F.
    "prescaled-asymmetric": (
        golden.Format(4, group=2, asymmetric=True, prescaled=True), [1.0, 2.0], None, [-3.0, 9.0],
        "F0 00 00 3F 40 C0", [-3.0, 9.0],
    ),
}  # fmt: skip


def layout_of(wire: golden.Format, hidden: int) -> PacketLayout:
    return PacketLayout(
        hidden, wire.bits, wire.group, wire.outliers, wire.values, wire.scales, wire.asymmetric, wire.prescaled
    )  # type: ignore[arg-type]


def format_of(layout: PacketLayout) -> golden.Format:
    return golden.Format(
        layout.bits, layout.group_size, layout.outliers,
        layout.values, layout.scale_format, layout.asymmetric, layout.prescaled,
    )  # fmt: skip


def same_bits(got: torch.Tensor, expected: np.ndarray) -> bool:
    got = got.contiguous()
    if got.dtype == torch.float32:
        return np.array_equal(got.view(torch.int32).numpy(), expected.view(np.int32))
    return np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize("name", HAND_MADE)
def test_golden_writes_the_packets_worked_out_by_hand(name):
    wire, scale, minimum, values, row, decoded = HAND_MADE[name]
    static = [None if side is None else np.array(side, np.float32) for side in (scale, minimum)]
    packet = golden.encode(np.array([values], np.float32), wire, static[0], None, static[1])
    assert packet[0].tobytes().hex(" ").upper() == row
    got = golden.decode(packet, len(values), wire, static[0], None, static[1])
    assert np.array_equal(got.view(np.int32), golden.canonical(np.array([decoded], np.float32)).view(np.int32))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("name", HAND_MADE)
def test_backends_write_the_packets_worked_out_by_hand(name, backend):
    try:
        module = get_backend(backend)
    except ValueError as error:
        pytest.skip(str(error))
    wire, scale, minimum, values, row, decoded = HAND_MADE[name]
    layout = layout_of(wire, len(values))
    scale, minimum = (None if side is None else torch.tensor(side) for side in (scale, minimum))
    packet_TB = torch.full((1, layout.row_nbytes), 0xAA, dtype=torch.uint8)
    inverse = None if scale is None else 1 / scale
    module.encode(torch.tensor([values]), layout, packet_TB, inverse, None, None, minimum)
    assert bytes(packet_TB[0].tolist()).hex(" ").upper() == row
    out_TH = torch.full((1, len(values)), NAN)
    module.decode(packet_TB, layout, out_TH, scale, None, None, minimum)
    assert same_bits(out_TH, golden.canonical(np.array([decoded], np.float32)))


@pytest.mark.parametrize("family", FAMILIES)
def test_random_packets_equal_golden(family):
    for seed in range(60):
        case = Case(1000 + seed, family)
        layout, wire = case.layout, format_of(case.layout)
        hidden, outliers = layout.features, array(case.outlier_index)
        scale_RH, minimum_RH = array(case.scale_RH), array(case.minimum_RH)
        assert golden.row_nbytes(wire, hidden) == layout.row_nbytes, layout
        packets = []
        for rank in range(case.ranks):
            x_TH = case.values()
            scale, minimum = (None if side is None else side[rank] for side in (scale_RH, minimum_RH))
            packets.append(golden.encode(array(x_TH), wire, scale, outliers, minimum))
            assert same_bits(case.encoded(reference, x_TH, rank, "cpu"), packets[rank]), f"encode {layout}"
        noise = [array(case.random_packet()) for _ in range(case.ranks)]
        for source in (packets, noise):
            sent = [torch.from_numpy(packet) for packet in source]
            scale, minimum = (None if side is None else side[0] for side in (scale_RH, minimum_RH))
            expected = golden.decode(source[0], hidden, wire, scale, outliers, minimum)
            assert same_bits(case.decoded(reference, sent[0], "cpu"), expected), f"decode {layout}"
            base_TH = torch.randn(case.tokens, hidden, generator=case.generator)
            with np.errstate(all="ignore"):
                added = golden.canonical(array(base_TH) + expected)
            assert same_bits(case.added(reference, sent[0], base_TH, "cpu"), added), f"decode with add {layout}"
            expected = golden.decode_sum(source, hidden, wire, scale_RH, outliers, minimum_RH)
            assert same_bits(case.summed(reference, sent, "cpu"), expected), f"decode_sum {layout}"


@pytest.mark.parametrize("seed", range(60))
def test_requantized_sums_equal_golden(seed):
    families = list(FAMILIES)
    case = Case(seed, families[seed % len(families)])
    gather = Case(seed, families[seed // 6 % len(families)], features=case.layout.features, tokens=case.tokens)
    source = [case.encoded(reference, case.values(), rank, "cpu") for rank in range(case.ranks)]
    total = golden.decode_sum(
        [packet.numpy() for packet in source], case.layout.features, format_of(case.layout),
        array(case.scale_RH), array(case.outlier_index), array(case.minimum_RH),
    )  # fmt: skip
    scale, minimum = (None if side is None else array(side)[0] for side in (gather.scale_RH, gather.minimum_RH))
    expected = golden.encode(total, format_of(gather.layout), scale, array(gather.outlier_index), minimum)
    assert same_bits(case.requantized(reference, source, gather, "cpu"), expected), f"{case.layout} {gather.layout}"


# ---- every code of the small floats ---------------------------------------------------------------------------------


def coded(values: torch.Tensor, layout: PacketLayout) -> torch.Tensor:
    packet_TB = torch.empty(1, layout.row_nbytes, dtype=torch.uint8)
    reference.encode(values[None].float(), layout, packet_TB, torch.ones(layout.features))
    return packet_TB[0]


def read(packet_B: torch.Tensor, layout: PacketLayout) -> torch.Tensor:
    out_TH = torch.empty(1, layout.features)
    reference.decode(packet_B[None], layout, out_TH, torch.ones(layout.features))
    return out_TH[0]


def test_all_codes_of_e4m3():
    """torch's own float8_e4m3fn as a second witness."""
    layout, codes = PacketLayout(256, 8, values="e4m3"), torch.arange(256, dtype=torch.uint8)
    values = read(codes, layout)
    expected = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(values.isnan(), expected.isnan()) and values.isnan().sum() == 2
    finite = ~values.isnan()
    assert torch.equal(values[finite].view(torch.int32), expected[finite].view(torch.int32))
    assert torch.equal(values[:127], torch.from_numpy(golden.E4M3).float())
    assert torch.equal(coded(values[finite], PacketLayout(254, 8, values="e4m3")), codes[finite])


def test_every_bf16_number_and_tie_as_e4m3():
    everything = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    grid = torch.from_numpy(golden.E4M3).float()
    ties = (grid[1:] + grid[:-1]) / 2
    near = torch.cat([ties, torch.nextafter(ties, torch.tensor(0.0)), torch.nextafter(ties, torch.tensor(INF))])
    x = torch.cat([everything, near, -near])
    codes = coded(x, PacketLayout(len(x), 8, values="e4m3"))
    assert torch.equal(codes[~x.isfinite()].unique(), torch.tensor([0x7F], dtype=torch.uint8))
    inside = x.abs() <= 448
    assert torch.equal(codes[inside], x[inside].to(torch.float8_e4m3fn).view(torch.uint8))
    beyond = x.isfinite() & ~inside
    assert torch.equal(codes[beyond], torch.where(x[beyond] > 0, 0x7E, 0xFE).to(torch.uint8))


def test_all_codes_of_e2m1():
    layout = PacketLayout(16, 4, values="e2m1")
    packet = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8)
    values = read(packet, layout)
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert values[:8].tolist() == positive and values[9:].tolist() == [-value for value in positive[1:]]
    assert values[8].isnan()
    assert torch.equal(coded(values, layout), packet)


def test_every_bf16_number_as_e2m1():
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    packet = coded(x, PacketLayout(65536, 4, values="e2m1"))
    codes = torch.stack((packet & 15, packet >> 4), dim=1).flatten()
    # nearest by distance in FP64, and of two equally near the even code
    grid = torch.from_numpy(golden.E2M1)
    distance = (x.double().abs().clamp_max(6.0)[:, None] - grid).abs()
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # argmin takes the first
    nearest = order[distance[:, order].argmin(dim=1)]
    expected = nearest + 8 * ((x < 0) & (nearest > 0))
    assert torch.equal(codes[x.isfinite()].long(), expected[x.isfinite()])
    assert (codes[~x.isfinite()] == 8).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_all_integer_codes_come_back(bits):
    """Every code of every width, at every place of a byte: what is read equals what the numbers say."""
    half, count = 2 ** (bits - 1), 3 * 2**bits + 1
    codes = torch.arange(count) * 5 % 2**bits
    packet = torch.from_numpy(golden.pack_planes(codes.numpy()[None], bits))
    layout, scale = PacketLayout(count, bits), torch.ones(count)
    padded = torch.zeros(layout.row_nbytes, dtype=torch.uint8)
    padded[: packet.shape[1]] = packet[0]
    values = read(padded, layout)
    signed = torch.where(codes >= half, codes - 2 * half, codes)
    assert values.isnan().equal(signed == -half) and values[signed > -half].equal(signed[signed > -half].float())
    assert torch.equal(coded(values, layout), padded)
    layout = PacketLayout(count, bits, asymmetric=True)
    out_TH = torch.empty(1, count)
    reference.decode(padded[None], layout, out_TH, scale, None, None, -scale)
    lost = codes == 2 * half - 1
    assert out_TH[0].isnan().equal(lost) and out_TH[0][~lost].equal(codes[~lost].float() - 1)
