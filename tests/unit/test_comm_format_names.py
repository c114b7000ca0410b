"""Names of formats and of mixes of two: what they mean, bit by bit, and what is refused with what advice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import golden
from helpers.golden_messages import golden_format
from helpers.messages import MORE_SCHEMES

from megatron_lowbit.comm.format_names import GRAMMAR, parse_format
from megatron_lowbit.comm.schemes import SCHEMES, CommScheme, parse_scheme
from megatron_lowbit.comm.wire_format import WHOLE_ROW, WireFormat


@pytest.mark.parametrize(
    ("name", "wire", "choice", "bits"),
    # bits: nominal, at 4096 features
    [
        ("exact", WireFormat(32), "none", 32),
        ("bf16", WireFormat(16), "none", 16),
        ("int3-group", WireFormat(3, 64), "none", 3.25),
        ("int8-group", WireFormat(8, 128), "none", 8.125),
        ("fp8-group", WireFormat(8, 128, values="e4m3"), "none", 8.125),
        ("int6-g32", WireFormat(6, 32), "none", 6.5),
        ("int4-g128-asym", WireFormat(4, 128, asymmetric=True), "none", 4.25),
        ("int4-asym-g128", WireFormat(4, 128, asymmetric=True), "none", 4.25),
        ("int5", WireFormat(5), "none", 5),
        ("int5-asym", WireFormat(5, asymmetric=True), "none", 5),
        ("fp8", WireFormat(8, values="e4m3"), "none", 8),
        ("fp4", WireFormat(4, values="e2m1"), "none", 4),
        ("fp8-g128", WireFormat(8, 128, values="e4m3"), "none", 8.125),
        ("fp4-g32", WireFormat(4, 32, values="e2m1"), "none", 4.5),
        ("int4-g32-e8m0", WireFormat(4, 32, scale_format="e8m0"), "none", 4.25),
        ("int4-g32-e4m3", WireFormat(4, 32, scale_format="e4m3"), "none", 4.25 + 16 / 4096),
        ("mxfp4", WireFormat(4, 32, values="e2m1", scale_format="e8m0"), "none", 4.25),
        ("mxfp8", WireFormat(8, 32, values="e4m3", scale_format="e8m0"), "none", 8.25),
        ("nvfp4", WireFormat(4, 16, values="e2m1", scale_format="e4m3"), "none", 4.5 + 16 / 4096),
        ("int4-g64-prescaled", WireFormat(4, 64, prescaled=True), "none", 4.25),
        ("int4-g64-prescaled0.7", WireFormat(4, 64, prescaled=True, exponent=0.7), "none", 4.25),
        ("int8-g64-prescaled1", WireFormat(8, 64, prescaled=True, exponent=1.0), "none", 8.25),
        ("int4-fitted", WireFormat(4, fitted=True), "none", 4),
        ("int4-fitted-outlier16", WireFormat(4, 0, 16, fitted=True), "calibrated", 15 / 16 * 4 + 1),
        ("int3-g64-random128", WireFormat(3, 64, 128), "random", (4064 * 3 + (64 + 32) * 16) / 4096),
        ("lm2-g16", WireFormat(2, 16, values="lm"), "none", 3),
        ("lm3-g64-e4m3-prescaled", WireFormat(3, 64, 0, "lm", "e4m3", prescaled=True), "none", 3.125 + 16 / 4096),
        ("lm4-group", WireFormat(4, 64, values="lm"), "none", 4.25),
        ("nf4-g32-e4m3", WireFormat(4, 32, values="nf4", scale_format="e4m3"), "none", 4.25 + 16 / 4096),
        ("nf4-token", WireFormat(4, WHOLE_ROW, values="nf4"), "none", 4 + 16 / 4096),
        ("int8-token", WireFormat(8, WHOLE_ROW), "none", 8 + 16 / 4096),
        ("int4-asym-token", WireFormat(4, WHOLE_ROW, asymmetric=True), "none", 4 + 32 / 4096),
        ("fp8-token-e8m0", WireFormat(8, WHOLE_ROW, values="e4m3", scale_format="e8m0"), "none", 8 + 8 / 4096),
        ("lm4-token-outlier", WireFormat(4, WHOLE_ROW, 64, "lm"), "calibrated", 63 / 64 * 4 + 16 / 64 + 16 / 4096),
        ("int4-outlier", WireFormat(4, 0, 64), "calibrated", 4.1875),
        ("int3-g64-random", WireFormat(3, 64, 64), "random", 63 / 64 * 3.25 + 16 / 64),
        ("nvfp4-outlier", WireFormat(4, 16, 64, "e2m1", "e4m3"), "calibrated", 63 / 64 * 4.5 + 16 / 64 + 16 / 4096),
    ],
)
def test_names_of_formats(name, wire, choice, bits):
    assert parse_format(name) == (wire, choice)
    scheme = parse_scheme(name)
    assert (scheme.reduce_stage, scheme.gather_stage, scheme.outlier_choice) == (wire, wire, choice)
    assert wire.bits_per_value(4096) == bits


@pytest.mark.parametrize("name", MORE_SCHEMES)
@pytest.mark.parametrize("hidden", [1, 63, 65, 576, 1000])
def test_rows_are_as_long_as_the_description_says(name, hidden):
    scheme = parse_scheme(name)
    assert scheme.name == name
    for wire in (scheme.reduce_stage, scheme.gather_stage):
        if wire is not None:
            assert wire.packet_layout(hidden).row_nbytes == golden.row_nbytes(golden_format(wire, hidden), hidden)
            assert wire.wire_bits_per_value(hidden) >= wire.bits_per_value(hidden)


@pytest.mark.parametrize("hidden", [1, 64, 100, 5000])
def test_a_scale_for_a_whole_row(hidden):
    """One group whatever the width; outliers are none of it, and where all features are, nothing is left."""
    for name in ("int4-token", "lm4-token-random", "fp8-token"):
        layout = parse_scheme(name).reduce_stage.packet_layout(hidden)
        assert (layout.groups, layout.group_size) == (1, layout.body)
    layout = WireFormat(4, WHOLE_ROW, outlier_divisor=1).packet_layout(hidden)
    assert (layout.body, layout.groups, layout.row_nbytes) == (0, 0, 2 * hidden)


def test_mixes_have_a_format_for_each_stage():
    scheme = parse_scheme("int4-outlier+int8-g128")
    assert scheme.reduce_stage == WireFormat(4, 0, 64) and scheme.gather_stage == WireFormat(8, 128)
    assert (scheme.stages, scheme.outlier_choice, scheme.outlier_count(640)) == (2, "calibrated", 10)
    # the sum leaves its owner once for every other rank, as a partial of each of them came: R=3, 2/3 of both rows
    assert scheme.sent_nbytes_per_token(640, 3) == pytest.approx(2 / 3 * (315 + 1 + 20 + 640 + 10))
    other = parse_scheme("bf16+int6-random:seed=4")
    assert (other.outlier_choice, other.seed, other.outlier_count(640)) == ("random", 4, 10)
    exact = parse_scheme("exact+int8-group").for_dtype(torch.bfloat16)
    assert (exact.reduce_stage, exact.gather_stage) == (WireFormat(16), WireFormat(8, 128))
    assert parse_scheme("int8-group+exact").for_dtype(torch.bfloat16).reduce_stage == WireFormat(8, 128)


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        *(("int5", True), ("int5-asym", True), ("fp8", True), ("fp4", True), ("int4-g64-prescaled", True)),
        *(("int4-g64-outlier", True), ("nvfp4-outlier", True), ("mxfp4", False), ("int4-g100-asym", False)),
        *(("int3-g32-random", False), ("bf16+int4", True), ("int4-g64+int8-g128", False), ("fp4-random", True)),
        *(("int5:one-stage", True), ("mxfp4:one-stage", False)),
        *(("lm4-g40", False), ("lm3-g40-prescaled", True), ("nf4-g64-outlier", True), ("int4-token", False)),
    ],
)
def test_what_needs_calibration(name, needed):
    assert parse_scheme(name).needs_calibration is needed


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int1", "no format is called 'int1'"),
        ("int4-g0", "no option of a format is called 'g0'"),
        ("int4-g", "'g'"),
        ("int4-g12x", "'g12x'"),
        ("int4-", "''"),
        ("int4-sym", "'sym'"),
        ("int4_group", "'int4_group'"),
        ("int4-asym-asym", "settles asymmetric a second time"),
        ("int4-g64-group", "settles group_size a second time"),
        ("mxfp4-g16", "settles group_size a second time"),
        ("nvfp4-e8m0", "settles scale_format a second time"),
        ("int4-outlier-random", "settles outlier_divisor a second time"),
        ("int4-g64-token", "settles group_size a second time"),
        ("nvfp4-token", "settles group_size a second time"),
        ("bf16-token", "bits=16 sends plain values"),
        ("lm5-g64", "no format is called 'lm5'"),
        ("nf3-g64", "no format is called 'nf3'"),
        ("lm4", "values 'lm' with group_size=0, .* go with groups only"),
        ("nf4-outlier", "values 'nf4' with group_size=0, .* go with groups only"),
        ("lm3-g64-e8m0", "scale_format 'e8m0'; .* scale_format 'bf16' or 'e4m3'"),
        ("nf4-g64-asym", "asymmetric with bits=4, values 'nf4'"),
        ("fp8-asym", "asymmetric with bits=8, values 'e4m3'"),
        ("int4-g8-e8m0-asym", "scale_format 'e8m0'"),
        ("int4-e8m0", "group_size is 0 with scale_format 'e8m0'"),
        ("int4-prescaled", "group_size is 0 with .* prescaled=True"),
        ("bf16-g64", "bits=16 sends plain values"),
        ("exact-outlier", "outlier_divisor is 64 with 32 bits"),
        ("int4+int4+int4", "3 formats"),
        ("int4+", "no format is called ''"),
        ("int4-outlier+int4-random", "one set of features serves both"),
    ],
)
def test_what_is_refused_and_why(text, reason):
    with pytest.raises(ValueError, match=f"unknown scheme .*{reason}") as caught:
        parse_scheme(text)
    assert GRAMMAR in str(caught.value) and all(name in str(caught.value) for name in SCHEMES)


@pytest.mark.parametrize("text", ["int4+int8:one-stage", "int4-g64+int4-asym:seed=1", "int3:two", "mxfp4:"])
def test_options_that_do_not_fit_are_refused(text):
    with pytest.raises(ValueError, match=r"unknown option .* allowed: 'one-stage' .* 'seed=N'"):
        parse_scheme(text)


def test_the_grammar_names_everything():
    """Every word that the parser takes is in the text that a user sees."""
    for name in ("exact", "bf16", "int2", "int8", "fp8", "fp4", "mxfp4", "mxfp8", "nvfp4"):
        assert name in GRAMMAR and parse_format(name)
    for name in ("lm2", "lm4", "nf4", "tc2", "tc4"):
        assert name in GRAMMAR and parse_format(f"{name}-group")
    for option in ("-group", "-gN", "-token", "-e8m0", "-e4m3", "-asym", "-prescaled", "-outlier", "-random"):
        assert option in GRAMMAR
    assert ":one-stage" in GRAMMAR
    assert parse_format("int4-g32-asym")[0].asymmetric  # its example


def test_stages_share_one_set_of_features():
    wire, other = WireFormat(4, 0, 64), WireFormat(4, 0, 32)
    with pytest.raises(ValueError, match=r"outlier_divisor \[32, 64\]"):
        CommScheme("mine", wire, other, "calibrated")
    with pytest.raises(ValueError, match="outlier_choice 'none'"):
        CommScheme("mine", wire, None)
    assert not CommScheme("mine", WireFormat(16), None, "calibrated").needs_calibration


@pytest.mark.parametrize(
    ("wire", "static", "minimum", "largest"),
    [
        (WireFormat(3), True, False, 3),
        (WireFormat(8, asymmetric=True), True, True, 254),
        (WireFormat(8, values="e4m3"), True, False, 448),
        (WireFormat(4, values="e2m1"), True, False, 6),
        (WireFormat(4, 8, asymmetric=True), False, False, 14),
        (WireFormat(4, 8, prescaled=True), True, False, 7),
        (WireFormat(4, 8, values="lm", prescaled=True), True, False, 1),
        (WireFormat(4, WHOLE_ROW, values="nf4"), False, False, 1),
        (WireFormat(4, WHOLE_ROW), False, False, 7),
    ],
)
def test_what_formats_need(wire, static, minimum, largest):
    assert (wire.is_static, wire.has_static_minimum, wire.largest_code) == (static, minimum, largest)


README = Path(__file__).resolve().parents[2] / "megatron_lowbit" / "comm" / "README.md"
BYTES = re.findall(r"^\| (`[^|]*) \| (\d+) \| ([\d.]+) \| (\d+) \| ([\d.]+) \|$", README.read_text(), re.MULTILINE)


@pytest.mark.parametrize("row", BYTES, ids=lambda row: row[0])
def test_the_table_of_the_description(row):
    names, wide, wide_bits, narrow, narrow_bits = row
    for name in re.findall("`([^`]+)`", names):
        wire = parse_scheme(name).reduce_stage
        assert (wire.packet_layout(5120).row_nbytes, wire.packet_layout(576).row_nbytes) == (int(wide), int(narrow))
        for hidden, bits in ((5120, wide_bits), (576, narrow_bits)):
            assert round(wire.wire_bits_per_value(hidden), len(bits.partition(".")[2])) == float(bits)


def test_the_table_was_found():
    assert len(BYTES) >= 18 and {"`bf16`", "`nvfp4`"} <= {row[0] for row in BYTES}
