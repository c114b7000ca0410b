"""The packet row, byte for byte, against rows worked out by hand."""

import math
import struct

import pytest
import torch

from lowbit_kernels import PacketLayout, get_backend, reference

NAN = math.nan
INF = math.inf


def index(values):
    return torch.tensor(values, dtype=torch.int64)


def encode_row(values, layout, inverse_scale=None, body=None, outliers=None, dtype=torch.float32):
    packet = torch.full((1, layout.row_nbytes), 0xAA, dtype=torch.uint8)
    inverse = None if inverse_scale is None else torch.tensor(inverse_scale, dtype=torch.float32)
    indices = (None, None) if body is None else (index(body), index(outliers))
    reference.encode(torch.tensor([values], dtype=dtype), layout, packet, inverse, *indices)
    return packet


def decode_row(packet, layout, scale=None, body=None, outliers=None):
    out = torch.full((packet.shape[0], layout.features), NAN)
    scales = None if scale is None else torch.tensor(scale, dtype=torch.float32)
    indices = (None, None) if body is None else (index(body), index(outliers))
    reference.decode(packet, layout, out, scales, *indices)
    return out


def hex_row(packet):
    return bytes(packet[0].tolist()).hex(" ")


def float_bits(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


@pytest.mark.parametrize(
    ("layout", "codes", "scales", "outliers", "row"),
    [
        (PacketLayout(5120, 4, 0, 80), 2520, 2520, 2520, 2680),  # the row of the paper's Llama-2-13B
        (PacketLayout(4096, 4, 0, 64), 2016, 2016, 2016, 2144),
        (PacketLayout(1, 4), 1, 2, 2, 2),
        (PacketLayout(7, 4, 3, 2), 3, 4, 8, 12),
        (PacketLayout(5, 4, 0, 5), 0, 0, 0, 10),
        (PacketLayout(5, 8, 4, 5), 0, 0, 0, 10),
        (PacketLayout(129, 8, 128), 129, 130, 134, 134),
        (PacketLayout(3, 16), 6, 6, 6, 6),
        (PacketLayout(3, 32), 12, 12, 12, 12),
    ],
)
def test_sections(layout, codes, scales, outliers, row):
    sections = (layout.codes_nbytes, layout.scales_offset, layout.outliers_offset, layout.row_nbytes)
    assert sections == (codes, scales, outliers, row)


def test_wire_bits_per_value():
    assert PacketLayout(5120, 4, 0, 80).wire_bits_per_value == 4.1875
    assert PacketLayout(4096, 4, 64).wire_bits_per_value == 4.25
    assert PacketLayout(4096, 16).wire_bits_per_value == 16


@pytest.mark.parametrize(
    "arguments",
    [(0, 4), (4, 1), (4, 9), (4, 4, -1), (4, 4, 0, 5), (4, 4, 0, -1), (4, 16, 2), (4, 32, 0, 1)],
)
def test_layout_refuses(arguments):
    with pytest.raises(ValueError, match=r"is -?\d+|must both be 0"):
        PacketLayout(*arguments)


def test_static_4_bit_bytes():
    # Products with 2.0: 1, 2.5 -> 2 (even), -3.5 -> -4 (even), 200 -> 7, -200 -> -7, NaN -> -8, -Inf -> -8
    row = [0.5, 1.25, -1.75, 100.0, -100.0, NAN, -INF]
    layout = PacketLayout(7, 4)
    packet = encode_row(row, layout, [2.0] * 7)
    assert hex_row(packet) == "21 7c 89 08"
    expected = [0.5, 1.0, -2.0, 3.5, -3.5, NAN, NAN]
    assert decode_row(packet, layout, [0.5] * 7)[0].tolist() == pytest.approx(expected, abs=0, rel=0, nan_ok=True)


def test_static_codes_saturate_where_the_product_overflows():
    packet = encode_row([3e38, -3e38], PacketLayout(2, 4), [1e30, 1e30])
    assert hex_row(packet) == "97 00"
    packet = encode_row([3e38, -3e38], PacketLayout(2, 8), [1e30, 1e30])
    assert hex_row(packet) == "7f 81"


def test_static_8_bit_bytes():
    packet = encode_row([1.0, -1.0, 126.5, 1000.0, INF], PacketLayout(5, 8), [1.0] * 5)
    assert hex_row(packet) == "01 ff 7e 7f 80 00"


def test_static_4_bit_with_outliers_bytes():
    # Outliers: features 1 and 4, 1.0 = 3f80 and the tie 1.00390625 (3f80 8000) to even = 3f80; body 0, 2, 3 = 1, -1, 3
    layout = PacketLayout(5, 4, 0, 2)
    row = [1.0, 1.0, -1.0, 3.0, 1.00390625]
    packet = encode_row(row, layout, [1.0, 1.0, 1.0], [0, 2, 3], [1, 4])
    assert hex_row(packet) == "f1 03 80 3f 80 3f"
    decoded = decode_row(packet, layout, [1.0, 1.0, 0.5], [0, 2, 3], [1, 4])
    assert decoded[0].tolist() == [1.0, 1.0, -1.0, 1.5, 1.0]


def test_group_4_bit_bytes():
    # Group 1: peak 8 -> scale -1 (bf80), codes -8, 1, 0; group 2: peak -4 -> scale 0.5 (3f00), codes -8, 4, clamped 7
    # group 3, a tail of one zero: scale 2**-100 (0d80), code 0
    layout = PacketLayout(7, 4, 3)
    packet = encode_row([8.0, -1.0, 0.5, -4.0, 2.0, 3.9, 0.0], layout)
    assert hex_row(packet) == "18 80 74 00 80 bf 00 3f 80 0d"
    assert decode_row(packet, layout)[0].tolist() == [8.0, -1.0, 0.0, -4.0, 2.0, 3.5, 0.0]


def test_group_4_bit_tie_takes_the_positive_peak():
    packet = encode_row([-8.0, 8.0], PacketLayout(2, 4, 2))
    assert hex_row(packet) == "87 00 80 bf"  # -8 / -1 = 8 is clamped to 7; 8 / -1 = -8


def test_group_8_bit_bytes():
    packet = encode_row([127.0, -127.0, 63.5, 0.4], PacketLayout(4, 8, 4))
    assert hex_row(packet) == "7f 81 40 00 80 3f"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_group_that_is_not_finite_becomes_nan_and_its_neighbour_does_not(bits, bad):
    layout = PacketLayout(4, bits, 2)
    packet = encode_row([1.0, bad, 1.0, 1.0], layout)
    assert packet[0, layout.scales_offset : layout.scales_offset + 2].tolist() == [0xC0, 0x7F]
    assert packet[0, : bits // 4].tolist() == [0] * (bits // 4)
    decoded = decode_row(packet, layout)[0]
    assert torch.isnan(decoded).tolist() == [True, True, False, False]


@pytest.mark.parametrize("bits", [4, 8])
def test_denormals_and_the_largest_values_in_groups(bits):
    layout = PacketLayout(4, bits, 2)
    packet = encode_row([1e-44, -1e-40, 3.4e38, -3.4e38], layout)
    assert hex_row(packet).startswith("00 ") and not torch.isnan(decode_row(packet, layout)).any()
    assert decode_row(packet, layout)[0, :2].tolist() == [0.0, 0.0]


def test_16_bit_bytes():
    # 1.0, an unexceptional rounding down, a signalling NaN with payload and sign, Inf, 3.4e38 beyond bf16 -> Inf
    values = torch.tensor([[0x3F800000, 0x3F807FFF, 0xFF800001 - (1 << 32), 0x7F800000, 0x7F7FFFFF]], dtype=torch.int32)
    layout = PacketLayout(5, 16)
    packet = torch.full((1, layout.row_nbytes), 0xAA, dtype=torch.uint8)
    reference.encode(values.view(torch.float32), layout, packet)
    assert hex_row(packet) == "80 3f 80 3f c0 7f 80 7f 80 7f"
    decoded = decode_row(packet, layout)
    assert decoded.view(torch.int32)[0, 2].item() == 0x7FC00000
    assert decoded[0, 3:].tolist() == [INF, INF]


def test_32_bit_bytes():
    values = torch.tensor([[0x3F800001, 0xFFFFFFFF - (1 << 32), 1]], dtype=torch.int32).view(torch.float32)
    layout = PacketLayout(3, 32)
    packet = torch.empty((1, 12), dtype=torch.uint8)
    reference.encode(values, layout, packet)
    assert hex_row(packet) == "01 00 80 3f 00 00 c0 7f 01 00 00 00"
    assert decode_row(packet, layout).view(torch.int32)[0].tolist() == [0x3F800001, 0x7FC00000, 1]


def test_bf16_input_equals_its_fp32_value():
    values = [0.1, -2.7, 5.3, 900.0]
    rounded = torch.tensor(values, dtype=torch.bfloat16).float().tolist()
    for layout in (PacketLayout(4, 4, 2), PacketLayout(4, 8, 4), PacketLayout(4, 16), PacketLayout(4, 32)):
        assert hex_row(encode_row(values, layout, dtype=torch.bfloat16)) == hex_row(encode_row(rounded, layout))


def test_decode_sum_adds_in_rank_order():
    # (2**24 + 1) + 1 = 2**24 in fp32, while 2**24 + (1 + 1) is 2**24 + 2
    layout = PacketLayout(1, 32)
    packets = [encode_row([value], layout) for value in (2.0**24, 1.0, 1.0)]
    out = torch.full((1, 1), NAN)
    reference.decode_sum(packets, layout, out)
    assert out.item() == 2.0**24
    reference.decode_sum(torch.stack(packets[::-1]), layout, out)
    assert out.item() == 2.0**24 + 2


def test_opposite_infinities_sum_to_the_one_nan():
    layout = PacketLayout(1, 32)
    out = torch.zeros(1, 1)
    reference.decode_sum([encode_row([value], layout) for value in (INF, -INF)], layout, out)
    assert float_bits(out.item()) == 0x7FC00000


def test_rows_of_a_packet_are_the_packet_of_those_rows():
    layout = PacketLayout(9, 4, 0, 1)
    body, outliers = index([0, 1, 2, 3, 5, 6, 7, 8]), index([4])
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    packet = torch.empty(6, layout.row_nbytes, dtype=torch.uint8)
    part = torch.empty(2, layout.row_nbytes, dtype=torch.uint8)
    reference.encode(x, layout, packet, torch.ones(8), body, outliers)
    reference.encode(x[3:5], layout, part, torch.ones(8), body, outliers)
    assert torch.equal(part, packet[3:5])
    whole, rows = torch.empty(6, 9), torch.empty(2, 9)
    reference.decode(packet, layout, whole, torch.ones(8), body, outliers)
    reference.decode(packet[3:5], layout, rows, torch.ones(8), body, outliers)
    assert torch.equal(rows, whole[3:5])


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("group_size", [0, 2])
@pytest.mark.parametrize("outliers", [0, 1, 3])
def test_no_tokens(bits, group_size, outliers):
    if bits > 8:
        group_size = outliers = 0
    layout = PacketLayout(3, bits, group_size, outliers)
    packet = torch.empty(0, layout.row_nbytes, dtype=torch.uint8)
    scale = torch.ones(layout.body) if layout.needs_static else None
    indices = (index(range(outliers, 3)), index(range(outliers))) if outliers else (None, None)
    out = torch.empty(0, 3)
    reference.encode(out, layout, packet, scale, *indices)
    reference.decode(packet, layout, out, scale, *indices)
    reference.decode_sum([packet], layout, out, None if scale is None else scale[None], *indices)


def test_arguments_that_do_not_fit():
    layout = PacketLayout(4, 4)
    x, packet, ones = torch.ones(2, 4), torch.empty(2, 2, dtype=torch.uint8), torch.ones(4)
    with pytest.raises(TypeError, match=r"torch\.float64"):
        reference.encode(x.double(), layout, packet, ones)
    with pytest.raises(ValueError, match="inverse_scale is missing"):
        reference.encode(x, layout, packet)
    with pytest.raises(ValueError, match="outlier_index was given"):
        reference.encode(x, layout, packet, ones, None, index([0]))
    with pytest.raises(ValueError, match=r"packet_TB is .* expected torch.uint8 \(2, 2\)"):
        reference.encode(x, layout, packet[:1], ones)
    with pytest.raises(ValueError, match="adjacent"):
        reference.encode(torch.ones(4, 2).t(), layout, packet, ones)
    with pytest.raises(ValueError, match="out_TH is"):
        reference.decode(packet, layout, x.bfloat16(), ones)
    with pytest.raises(ValueError, match="needs at least 1"):
        reference.decode_sum([], layout, x, ones[None])
    with pytest.raises(ValueError, match=r"scale_RH is .* expected torch.float32 \(2, 4\)"):
        reference.decode_sum([packet, packet], layout, x, ones[None])


def test_backends_by_name():
    assert get_backend("torch", "cpu").name == "torch"
    assert get_backend("auto", "cpu").name in ("torch", "cpu")
    assert get_backend("auto", torch.device("meta")).name == "torch"
    with pytest.raises(ValueError, match="allowed: auto, torch, cpu, triton"):
        get_backend("cuda", "cpu")
    with pytest.raises(ValueError, match="Available: torch"):
        get_backend("cpu", "cuda")
