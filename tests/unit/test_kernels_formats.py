"""Layouts of all formats by exact numbers: sections, planes, nominal and wire bits; and what has no meaning."""

import pytest
import torch

from lowbit_kernels import PacketLayout, reference


@pytest.mark.parametrize(
    ("layout", "planes", "offsets", "sections"),
    # sections: end of the codes, row scale, scales, end of the scales, minimums, outliers, row
    [
        # 9 codes of 7 bits: ceil(36/8) + ceil(18/8) + ceil(9/8) = 5 + 3 + 2
        (PacketLayout(9, 7, 4), (4, 2, 1), (0, 5, 8), (10, 10, 10, 16, 16, 16, 16)),
        (PacketLayout(9, 3), (2, 1), (0, 3), (5, 6, 6, 6, 6, 6, 6)),
        (PacketLayout(9, 5), (4, 1), (0, 5), (7, 8, 8, 8, 8, 8, 8)),
        (PacketLayout(9, 6), (4, 2), (0, 5), (8, 8, 8, 8, 8, 8, 8)),
        (PacketLayout(9, 2), (2,), (0,), (3, 4, 4, 4, 4, 4, 4)),
        # three scales and three minimums of 2 bytes
        (PacketLayout(9, 4, 4, asymmetric=True), (4,), (0,), (5, 6, 6, 12, 12, 18, 18)),
        (PacketLayout(9, 4, asymmetric=True), (4,), (0,), (5, 6, 6, 6, 6, 6, 6)),
        # 8 codes and an outlier; e8m0 scales follow the codes at once, 16-bit values at an even byte
        (PacketLayout(9, 2, 2, 1, scale_format="e8m0"), (2,), (0,), (2, 2, 2, 6, 6, 6, 8)),
        (PacketLayout(9, 4, 3, 0, "e2m1", "e8m0"), (4,), (0,), (5, 6, 5, 8, 8, 8, 8)),
        (PacketLayout(9, 4, 2, 0, "e2m1", "e8m0"), (4,), (0,), (5, 6, 5, 10, 10, 10, 10)),
        (PacketLayout(9, 4, 2, 1, "e2m1", "e8m0"), (4,), (0,), (4, 4, 4, 8, 8, 8, 10)),
        (PacketLayout(9, 8, 4, 2, "e4m3", "e8m0"), (8,), (0,), (7, 8, 7, 9, 10, 10, 14)),
        # e4m3 scales: the bf16 scale of the row before them, padding behind an odd number of them
        (PacketLayout(9, 4, 4, 0, "e2m1", "e4m3"), (4,), (0,), (5, 6, 8, 11, 12, 12, 12)),
        (PacketLayout(3, 4, 4, 3, "e2m1", "e4m3"), (4,), (0,), (0, 0, 2, 2, 2, 2, 8)),
        (PacketLayout(9, 3, 4, 1, "lm", "e4m3"), (2, 1), (0, 2), (3, 4, 6, 8, 8, 8, 10)),
        (PacketLayout(9, 4, 9, 0, "nf4"), (4,), (0,), (5, 6, 6, 8, 8, 8, 8)),
        (PacketLayout(9, 16), (), (), (18, 18, 18, 18, 18, 18, 18)),
    ],
)
def test_sections(layout, planes, offsets, sections):
    assert (layout.planes, layout.plane_offsets) == (planes, offsets)
    assert sections == (
        layout.codes_nbytes, layout.row_scale_offset, layout.scales_offset, layout.scales_end,
        layout.minimums_offset, layout.outliers_offset, layout.row_nbytes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "nominal"),
    [
        *(({"bits": bits}, bits) for bits in (2, 3, 4, 5, 6, 7, 8, 16, 32)),
        ({"bits": 3, "group_size": 64}, 3 + 16 / 64),
        ({"bits": 4, "group_size": 32, "values": "e2m1", "scale_format": "e8m0"}, 4.25),  # MXFP4
        ({"bits": 8, "group_size": 32, "values": "e4m3", "scale_format": "e8m0"}, 8.25),  # MXFP8
        ({"bits": 4, "group_size": 16, "values": "e2m1", "scale_format": "e4m3"}, 4.5 + 16 / 4096),  # NVFP4
        ({"bits": 8, "group_size": 128, "values": "e4m3"}, 8.125),
        ({"bits": 3, "group_size": 64, "values": "lm"}, 3.25),
        ({"bits": 4, "group_size": 32, "values": "nf4", "scale_format": "e4m3"}, 4.25 + 16 / 4096),
        ({"bits": 4, "group_size": 4096}, 4 + 16 / 4096),
        ({"bits": 4, "group_size": 64, "asymmetric": True}, 4 + 32 / 64),
        ({"bits": 5, "asymmetric": True}, 5),
        ({"bits": 4, "group_size": 64, "prescaled": True}, 4.25),
        ({"bits": 4, "outliers": 64}, 63 / 64 * 4 + 1 / 64 * 16),
    ],
)
def test_bits_of_wide_rows(options, nominal):
    """4096 features fill their bytes: what travels is what the format says."""
    layout = PacketLayout(4096, **options)
    assert layout.nominal_bits_per_value == layout.wire_bits_per_value == nominal


def test_bits_of_narrow_rows_include_padding():
    # 33 codes of 3 bits in planes: ceil(66/8) + ceil(33/8) = 9 + 5 = 14 bytes, and 2 scales
    layout = PacketLayout(33, 3, 32)
    assert layout.nominal_bits_per_value == (99 + 32) / 33 and layout.wire_bits_per_value == 8 * 18 / 33
    # 17 bytes of codes, 2 of e8m0 scales, 1 of padding
    layout = PacketLayout(33, 4, 32, 0, "e2m1", "e8m0")
    assert layout.nominal_bits_per_value == (132 + 16) / 33 and layout.wire_bits_per_value == 8 * 20 / 33


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"bits": 1}, "bits is 1"),
        ({"bits": 9}, "bits is 9"),
        ({"bits": 4, "values": "int4"}, "values is 'int4'"),
        ({"bits": 4, "scale_format": "fp32"}, "scale_format is 'fp32'"),
        ({"bits": 4, "values": "e4m3"}, "bits is 4 with values 'e4m3'"),
        ({"bits": 8, "values": "e2m1"}, "bits is 8 with values 'e2m1'"),
        ({"bits": 16, "values": "e4m3"}, "bits is 16 with values 'e4m3'"),
        ({"bits": 4, "scale_format": "e8m0"}, "group_size is 0 with scale_format 'e8m0'"),
        ({"bits": 4, "prescaled": True}, "group_size is 0 with .* prescaled=True"),
        ({"bits": 16, "prescaled": True}, "group_size is 0 with .* prescaled=True"),
        ({"bits": 16, "asymmetric": True}, "asymmetric with bits=16"),
        ({"bits": 8, "values": "e4m3", "asymmetric": True}, "asymmetric with bits=8, values 'e4m3'"),
        ({"bits": 4, "group_size": 8, "scale_format": "e4m3", "asymmetric": True}, "scale_format 'e4m3'"),
        ({"bits": 5, "group_size": 8, "values": "lm"}, "bits is 5 with values 'lm'"),
        ({"bits": 3, "group_size": 8, "values": "nf4"}, "bits is 3 with values 'nf4'"),
        ({"bits": 16, "values": "lm"}, "bits is 16 with values 'lm'"),
        ({"bits": 4, "values": "lm"}, "values 'lm' with group_size=0"),
        ({"bits": 4, "values": "nf4"}, "values 'nf4' with group_size=0"),
        ({"bits": 4, "group_size": 8, "values": "lm", "scale_format": "e8m0"}, "scale_format 'e8m0'"),
        ({"bits": 4, "group_size": 8, "values": "lm", "asymmetric": True}, "asymmetric with bits=4, values 'lm'"),
        ({"bits": 16, "group_size": 8, "scale_format": "e4m3"}, "must both be 0"),
    ],
)
def test_what_has_no_meaning_is_refused(options, names):
    with pytest.raises(ValueError, match=names) as caught:
        PacketLayout(64, **options)
    assert "allowed" in str(caught.value) or "must" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "static", "minimum"),
    [
        ({"bits": 5}, True, False),
        ({"bits": 5, "asymmetric": True}, True, True),
        ({"bits": 5, "asymmetric": True, "group_size": 2}, False, False),
        ({"bits": 5, "asymmetric": True, "group_size": 2, "prescaled": True}, True, False),
        ({"bits": 8, "values": "e4m3"}, True, False),
        ({"bits": 4, "values": "e2m1", "group_size": 2, "scale_format": "e8m0"}, False, False),
        ({"bits": 3, "values": "lm", "group_size": 2}, False, False),
        ({"bits": 4, "values": "nf4", "group_size": 4, "prescaled": True}, True, False),
        ({"bits": 16}, False, False),
    ],
)
def test_static_numbers_are_demanded_exactly_where_they_are_used(options, static, minimum):
    layout = PacketLayout(4, **options)
    assert (layout.needs_static, layout.needs_minimum) == (static, minimum)
    x_TH, packet_TB = torch.ones(1, 4), torch.empty(1, layout.row_nbytes, dtype=torch.uint8)
    given = [torch.ones(4) if static else None, None, None, torch.zeros(4) if minimum else None]
    wrong = {0: "inverse_scale", 3: "minimum"}
    reference.encode(x_TH, layout, packet_TB, *given)
    for place, name in wrong.items():
        other = list(given)
        other[place] = torch.ones(4) if given[place] is None else None
        with pytest.raises(ValueError, match=f"{name} (was given|is missing)"):
            reference.encode(x_TH, layout, packet_TB, *other)
        with pytest.raises(ValueError, match=r"(scale|minimum) (was given|is missing)"):
            reference.decode(packet_TB, layout, x_TH, *other)
        with pytest.raises(ValueError, match=r"(scale|minimum)_RH (was given|is missing)"):
            stacked = [None if side is None else side[None] for side in other]
            reference.decode_sum([packet_TB], layout, x_TH, *stacked)


def test_arguments_of_the_joined_steps():
    reduce, gather = PacketLayout(4, 8, 2), PacketLayout(4, 4, 0, 1)
    packet_TB, sent_TB = (torch.zeros(2, layout.row_nbytes, dtype=torch.uint8) for layout in (reduce, gather))
    indices = {"gather_body_index": torch.tensor([0, 1, 3]), "gather_outlier_index": torch.tensor([2])}
    inverse = {"gather_inverse_scale": torch.ones(3)}
    reference.requantize([packet_TB], reduce, sent_TB, gather, **indices, **inverse)
    for match, arguments in {
        "gather_inverse_scale is missing": ([packet_TB], reduce, sent_TB, gather, indices),
        "gather_body_index is missing": ([packet_TB], reduce, sent_TB, gather, inverse),
        "packet_TB is": ([packet_TB], reduce, sent_TB[:, :-2], gather, indices | inverse),
        r"packets_RTB\[r\] is": ([packet_TB[:1]], reduce, sent_TB, gather, indices | inverse),
        "needs at least 1": ([], reduce, sent_TB, gather, indices | inverse),
        "they must be equal": ([packet_TB], reduce, sent_TB, PacketLayout(5, 4), {}),
    }.items():
        with pytest.raises(ValueError, match=match):
            reference.requantize(*arguments[:4], **arguments[4])
    residual, normed, weight = torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(4)
    reference.decode_add_norm(packet_TB, reduce, residual, normed, weight, 1e-5)
    with pytest.raises(TypeError, match=r"normed_TH is torch\.float16"):
        reference.decode_add_norm(packet_TB, reduce, residual, normed.half(), weight, 1e-5)
    for match, wrong in {
        "residual_TH is": (residual.bfloat16(), normed, weight, None),
        "normed_TH is": (residual, normed[:1], weight, None),
        "weight_H is": (residual, normed, weight.bfloat16(), None),
        "bias_H is": (residual, normed, weight, torch.ones(3)),
    }.items():
        with pytest.raises(ValueError, match=match):
            reference.decode_add_norm(packet_TB, reduce, *wrong[:3], 1e-5, bias_H=wrong[3])


def test_the_residual_and_its_norm_by_hand():
    # decoded [3, -4] + bias [1, 0] joins [-1, 8]: [3, 4]; mean square 12.5, rounded nowhere but in the root
    layout = PacketLayout(2, 32)
    packet_TB = torch.empty(1, 8, dtype=torch.uint8)
    reference.encode(torch.tensor([[3.0, -4.0]]), layout, packet_TB)
    residual, normed = torch.tensor([[-1.0, 8.0]]), torch.empty(1, 2)
    weight, bias = torch.tensor([1.0, 10.0]), torch.tensor([1.0, 0.0])
    reference.decode_add_norm(packet_TB, layout, residual, normed, weight, 0.0, bias_H=bias)
    assert residual.tolist() == [[3.0, 4.0]]
    assert normed[0].tolist() == pytest.approx([3 / 12.5**0.5, 40 / 12.5**0.5], rel=1e-6)
    # a finite value and an infinite one give the one NaN in their place, and only there
    residual = torch.tensor([[torch.inf, 1.0]])
    reference.encode(torch.tensor([[-torch.inf, 1.0]]), layout, packet_TB)
    reference.decode(packet_TB, layout, residual, add=True)
    assert residual.view(torch.int32)[0, 0] == 0x7FC00000 and residual[0, 1] == 2.0
