"""Wire formats and schemes: the arithmetic of bits and bytes, and names that are parsed or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import golden
from helpers.messages import ALL_SCHEMES

from megatron_lowbit.comm.schemes import SCHEMES, CommScheme, PointFormats, parse_scheme
from megatron_lowbit.comm.wire_format import WireFormat

PAPER = SCHEMES["int4-outlier"].reduce_stage
INT4 = SCHEMES["int4"].reduce_stage


@pytest.mark.parametrize("hidden", [64, 128, 576, 2880, 4096, 4608, 5120, 8192])
def test_the_papers_format_is_4_1875_bits(hidden):
    """63/64 of 4 bits and 1/64 of 16, for every multiple of 64."""
    assert PAPER.outlier_count(hidden) == hidden // 64
    assert PAPER.bits_per_value(hidden) == 63 / 64 * 4 + 1 / 64 * 16 == 4.1875


@pytest.mark.parametrize("hidden", [4096, 5120, 8192])
def test_wide_rows_have_no_padding(hidden):
    assert PAPER.wire_bits_per_value(hidden) == 4.1875


def test_wire_bits_of_narrow_rows_include_padding():
    # 576 = 567 codes + 9 outliers: 283.5 bytes of codes, the scales' place rounds up to 284, 18 of outliers
    assert PAPER.packet_layout(576).row_nbytes == 284 + 18
    assert PAPER.wire_bits_per_value(576) == pytest.approx(8 * 302 / 576)
    assert PAPER.wire_bits_per_value(576) == pytest.approx(4.194, abs=5e-4)
    # below 64 features nothing is set apart
    assert PAPER.outlier_count(63) == 0 and PAPER.bits_per_value(63) == 4


@pytest.mark.parametrize(
    ("name", "nominal"),
    # 16 bits of scale over 64 or 128 values: 0.25 and 0.125
    [("exact", 32), ("bf16", 16), ("int8-group", 8.125), ("int4-group", 4.25), ("int4", 4), ("int4-random", 4.1875)],
)
def test_bits_of_the_named_schemes(name, nominal):
    scheme = parse_scheme(name)
    assert scheme.gather_stage is not None
    for wire in (scheme.reduce_stage, scheme.gather_stage):
        assert wire.bits_per_value(5120) == wire.wire_bits_per_value(5120) == nominal


@pytest.mark.parametrize("name", ALL_SCHEMES)
@pytest.mark.parametrize("hidden", [1, 2, 63, 64, 65, 576, 1000, 5120])
def test_rows_are_as_long_as_the_description_says(name, hidden):
    wire = parse_scheme(name).reduce_stage
    ours = golden.Format(wire.bits, wire.group_size, hidden // 64 if wire.outlier_divisor else 0)
    assert wire.packet_layout(hidden).row_nbytes == golden.row_nbytes(ours, hidden)
    assert wire.wire_bits_per_value(hidden) >= wire.bits_per_value(hidden)


def test_sent_bytes_of_the_papers_model():
    """Llama-2-13B, H=5120, 8 ranks: a row is 2,680 bytes instead of 10,240."""
    # each token: 7 of 8 ranks send a row to the owner, the owner sends 7; over 8 ranks 2 * 7/8 rows each
    two, one = parse_scheme("int4-outlier"), parse_scheme("int4-outlier:one-stage")
    assert two.sent_nbytes_per_token(5120, 8) == 2 * 7 / 8 * 2680 == 4690
    assert one.sent_nbytes_per_token(5120, 8) == 7 * 2680 == 18760
    assert parse_scheme("bf16").sent_nbytes_per_token(5120, 8) == 2 * 7 / 8 * 10240
    # one stage at 8 ranks costs more than 16 bits in two: the reason there are two stages
    assert one.sent_nbytes_per_token(5120, 8) > parse_scheme("bf16").sent_nbytes_per_token(5120, 8)


@pytest.mark.parametrize("name", ALL_SCHEMES)
def test_names_survive_parsing(name):
    scheme = parse_scheme(name)
    assert scheme.name == name
    assert scheme.stages == (1 if name.endswith(":one-stage") else 2)
    assert (scheme.gather_stage is None) == name.endswith(":one-stage")


@pytest.mark.parametrize("name", ["int4", "int4-random", "int4-outlier"])
def test_static_schemes_need_calibration(name):
    assert parse_scheme(name).needs_calibration and parse_scheme(name + ":one-stage").needs_calibration


@pytest.mark.parametrize("name", ["exact", "bf16", "int4-group", "int8-group"])
def test_other_schemes_need_none(name):
    assert not parse_scheme(name).needs_calibration and not parse_scheme(name + ":one-stage").needs_calibration


def test_seed_of_the_random_baseline():
    assert parse_scheme("int4-random").seed == 0
    assert parse_scheme("int4-random:seed=17").seed == 17
    both = parse_scheme("int4-random:one-stage:seed=3")
    assert both.seed == 3 and both.gather_stage is None


@pytest.mark.parametrize(
    "text",
    [
        *("", "int9", "INT4", "int4 ", "paper", ":one-stage"),
        *("int4:two-stage", "int4:", "int4:one-stage:", "int4:seed=1", "int4-outlier:seed=1"),
        *(
            "int4-random:seed=",
            "int4-random:seed=-1",
            "int4-random:seed=x",
            "int4-random:seed=1.5",
            "int4-random:Seed=1",
        ),
    ],
)
def test_unknown_names_and_options_are_refused(text):
    with pytest.raises(ValueError, match=r"unknown (scheme|option)") as caught:
        parse_scheme(text)
    # the message lists what would have been right
    assert "one-stage" in str(caught.value) and "int4-random" in str(caught.value)
    if text.split(":")[0] not in SCHEMES:
        for name in SCHEMES:
            assert name in str(caught.value)


@pytest.mark.parametrize("arguments", [(1,), (9,), (0,), (4, -1), (4, 0, -64), (16, 64), (32, 0, 64)])
def test_formats_without_meaning_are_refused(arguments):
    with pytest.raises(ValueError, match="wire format"):
        WireFormat(*arguments)


def test_exact_is_the_models_own_dtype():
    exact = parse_scheme("exact")
    assert exact.for_dtype(torch.float32) is exact
    # bf16 partial sums lose nothing on a 16-bit wire; their sum is no longer a bf16 number and travels whole
    narrow = exact.for_dtype(torch.bfloat16)
    assert narrow.reduce_stage == WireFormat(16) and narrow.gather_stage == WireFormat(32)
    assert parse_scheme("exact:one-stage").for_dtype(torch.bfloat16).reduce_stage == WireFormat(16)
    for name in ALL_SCHEMES:
        if not name.startswith("exact"):
            assert parse_scheme(name).for_dtype(torch.bfloat16) == parse_scheme(name)


def test_schemes_and_formats_are_frozen():
    with pytest.raises(AttributeError):
        SCHEMES["int4"].seed = 1  # type: ignore[misc]
    with pytest.raises(AttributeError):
        PAPER.bits = 8  # type: ignore[misc]
    assert isinstance(hash(SCHEMES["int4"]), int) and CommScheme("a", INT4, None) == CommScheme("a", INT4, None)


def test_first_and_last_sync_points_have_formats_of_their_own():
    names = ["a", "b", "c", "d"]
    scheme = parse_scheme("int3-g64:loop:last=int7-g64+int8-g64:first=int4-g64")
    bits = [(own.reduce_stage.bits, own.gather_stage.bits) for own in (scheme.at(name, names) for name in names)]
    assert bits == [(4, 4), (3, 3), (3, 3), (7, 8)]
    assert all(scheme.at(name, names).loop and not scheme.at(name, names).points for name in names)
    reduce, gather = scheme.wire_bits_per_value(640, names, False)
    assert (reduce, gather) == (17 / 4 + 0.25, 18 / 4 + 0.25)
    # the formats of a path come before those of an end, and those of the first before the last's
    named = replace(scheme, points=(*scheme.points, PointFormats("d", *[WireFormat(5, 64)] * 2)))
    assert named.at("d", names).reduce_stage.bits == 5 and named.at("a", ["a"]).reduce_stage.bits == 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int4-g64:last", "unknown option 'last'"),
        ("int4-g64:last=", "unknown option 'last='"),
        ("int4-g64:last=int9", "option 'last=int9': no format is called 'int9'"),
        ("int4-g64:last=int5-g64:last=int6-g64", "unknown option 'last=int6-g64'"),
        ("int4-g64:first=int5-g64-outlier", "its BF16 features are calibrated ones, those of the scheme none"),
        ("int4-g64-outlier:last=int5-g64-outlier+int6-g64-outlier32", "outlier_divisor"),
        ("int4-g64:one-stage:last=int5-g64", "two stages"),
        ("int4-g64:last=int5-g64:one-stage", "two stages"),
    ],
)
def test_ends_that_make_no_scheme_are_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_scheme(text)
