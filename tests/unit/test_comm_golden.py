"""Codecs, the reference and virtual ranks against a NumPy implementation that shares no code with the project."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import golden, golden_method
from helpers.golden_messages import array, golden_all_reduce
from helpers.messages import ALL_SCHEMES, MORE_SCHEMES, ROTATED_SCHEMES, draw_message, random_values
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lowbit_kernels import get_backend
from megatron_lowbit.comm import reference
from megatron_lowbit.comm.all_reduce import build_all_reduce
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.wire_format import WireFormat
from megatron_lowbit.parallel import ParallelContext

NAN, INF = float("nan"), float("inf")
# derandomize: the same examples everywhere, so that a failure on one machine can be repeated on any other
QUICK = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=["torch", "cpu"])
def backend(request):
    try:
        return get_backend(request.param)
    except ValueError as error:
        pytest.skip(str(error))


# ---- packets worked out by hand -------------------------------------------------------------------------------------

HAND_MADE = {
    # Feature 2 is the outlier. Codes of the others, x / scale: 1.25 / 0.5 = 2.5 -> 2 (even); -0.6 / 0.5 = -1.2 -> -1,
    # nibble F; 100 / 2 = 50 -> 7; NaN -> -8, nibble 8. Low nibble first: F2 87. Two code bytes, so the outlier follows
    # at once: 3.14159 is 0x40490FD0, in bf16 0x4049 (0FD0 is below half), low byte first: 49 40.
    "static-4-outlier": (
        golden.Format(4, outliers=1), [0.5, 0.5, 2.0, 0.25], [2],
        [1.25, -0.6, 3.14159, 100.0, NAN], "F2 87 49 40", [1.0, -0.5, 3.140625, 14.0, NAN],
    ),
    # Inf is not finite either: 8. -9 / 1 clamps to -7 = 9. -0.5 / 1 is a tie, rounded to -0 -> 0. Bytes 98, then 00 for
    # the third value and its empty high nibble.
    "static-4": (
        golden.Format(4), [1.0, 1.0, 1.0], None, [-INF, -9.0, -0.5], "98 00", [NAN, -7.0, 0.0],
    ),
    # Group 1, [4, -1, 0.6, -3.9]: the largest magnitude is 4, so the scale is 4 / -8 = -0.5 = 0xBF00 and the codes are
    # x / -0.5: -8 (nibble 8); 2; -1.2 -> -1 (F); 7.8 -> 8, which clamps to 7. Bytes 28 7F.
    # Group 2, [-0.3] (shorter): scale -0.3 / -8 = 0.0375 = 1.2 * 2^-5; 0.2 * 128 = 25.6 -> 26, so 1 + 26/128 at
    # exponent 122 = 0x7A: 0x3D1A = 0.03759765625; -0.3 / 0.0376 = -7.98 -> -8 (8). Byte 08, then 00 to an even offset.
    "group-4": (
        golden.Format(4, group=4), None, None, [4.0, -1.0, 0.6, -3.9, -0.3], "28 7F 08 00 00 BF 1A 3D",
        [4.0, -1.0, 0.5, -3.5, -0.30078125],
    ),
    # A tie of magnitudes takes the positive one: scale 2 / -8 = -0.25 = 0xBE80, codes -8 = 8 and 8 -> 7. The second
    # group holds Inf: scale NaN = 0x7FC0, codes 0. The third is all zero: scale 2^-100, exponent 27 = 0x1B: 0x0D80.
    "group-4-special": (
        golden.Format(4, group=2), None, None, [2.0, -2.0, 1.0, INF, 0.0, -0.0], "78 00 00 00 80 BE C0 7F 80 0D",
        [2.0, -1.75, NAN, NAN, 0.0, 0.0],
    ),
    # 127 * fp32(1/127) rounds to 1.0 = 0x3F80: codes 127 = 7F; -1.5 -> -2 = FE; 63.5 -> 64 = 40. The scale starts at
    # the even byte 4, behind one of padding.
    "group-8": (
        golden.Format(8, group=128), None, None, [127.0, -1.5, 63.5], "7F FE 40 00 80 3F", [127.0, -2.0, 64.0],
    ),
    # 1 = 0x3F80; any NaN = 0x7FC0; the largest finite FP32 is beyond bf16 and becomes Inf = 0x7F80.
    "bf16": (golden.Format(16), None, None, [1.0, -NAN, 3.4028235e38], "80 3F C0 7F 80 7F", [1.0, NAN, INF]),
    # -0.1 = 0xBDCCCCCD; NaN = 0x7FC00000.
    "fp32": (golden.Format(32), None, None, [-0.1, NAN], "CD CC CC BD 00 00 C0 7F", [np.float32(-0.1), NAN]),
}  # fmt: skip


@pytest.mark.parametrize("name", HAND_MADE)
def test_golden_writes_the_packets_worked_out_by_hand(name):
    wire, scale, outliers, values, row, decoded = HAND_MADE[name]
    x = np.array([values], np.float32)
    scale_D = None if scale is None else np.array(scale, np.float32)
    packet = golden.encode(x, wire, scale_D, outliers)
    assert packet[0].tobytes().hex(" ").upper() == row
    got = golden.decode(packet, len(values), wire, scale_D, outliers)
    np.testing.assert_array_equal(got, np.array([decoded], np.float32))


@pytest.mark.parametrize("name", HAND_MADE)
def test_backends_write_the_packets_worked_out_by_hand(backend, name):
    wire, scale, outliers, values, row, decoded = HAND_MADE[name]
    codec = codec_of(wire, len(values), backend, None if scale is None else torch.tensor([scale]), outliers)
    packet = codec.encode(torch.tensor([values]), sender=0)
    assert bytes(packet[0].tolist()).hex(" ").upper() == row
    np.testing.assert_array_equal(codec.decode(packet, sender=0).numpy(), np.array([decoded], np.float32))


def test_two_stages_by_hand():
    """R=2, static scales: rank 0 has [0.5, 1], rank 1 [0.25, 1], the sum [1, 2]."""
    # rank 0: 1.3 / 0.5 = 2.6 -> 3, 1.5; 3.4 -> 3.  rank 1: -0.3 / 0.25 = -1.2 -> -1, -0.25; -9 -> -7.
    # sum [1.25, -4]; again in codes: 1.25 -> 1, -4 / 2 = -2: [1, -4]. One stage would have given [1.25, -4].
    partials = [np.array([[1.3, 3.4]], np.float32), np.array([[-0.3, -9.0]], np.float32)]
    scales = np.array([[0.5, 1.0], [0.25, 1.0]], np.float32)
    wire = golden.Format(4)
    assert golden_method.all_reduce(partials, wire, wire, scales, np.array([1.0, 2.0], np.float32)).tolist() == [
        [1.0, -4.0]
    ]
    assert golden_method.all_reduce(partials, wire, None, scales).tolist() == [[1.25, -4.0]]


# ---- drawn messages -------------------------------------------------------------------------------------------------


def assert_same_bits(got: torch.Tensor, expected: np.ndarray, what: object) -> None:
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.contiguous().numpy().view(np.int32), expected.view(np.int32), err_msg=str(what))


def codec_of(wire: golden.Format, hidden, backend, scale_RD=None, outliers=None) -> Codec:
    """A Codec of a format of the golden implementation; `scale_RD` in body order or over all features."""
    outlier_index = torch.tensor(outliers, dtype=torch.int64) if wire.outliers else None
    body_index = None
    if wire.outliers:
        body_index = torch.tensor(sorted(set(range(hidden)) - set(outlier_index.tolist())), dtype=torch.int64)
    divisor = hidden // wire.outliers if wire.outliers else 0
    ours = WireFormat(wire.bits, wire.group, divisor)
    assert ours.outlier_count(hidden) == wire.outliers, "choose hidden as a multiple of the outliers"
    return Codec(ours, hidden, backend, body_index, outlier_index, scale_RD)


schemes_and_shapes = given(
    scheme=st.sampled_from(ALL_SCHEMES),
    ranks=st.integers(1, 5),
    tokens=st.integers(0, 40),
    hidden=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
)


@QUICK
@schemes_and_shapes
@example(scheme="int4-outlier", ranks=3, tokens=1, hidden=64, seed=1)
@example(scheme="int4-outlier", ranks=5, tokens=3, hidden=63, seed=2)  # too few features for an outlier
@example(scheme="int4-group", ranks=2, tokens=2, hidden=65, seed=3)  # a group of one
def test_reference_and_virtual_ranks_equal_golden(scheme, ranks, tokens, hidden, seed):
    message = draw_message(seed, ranks, scheme, tokens, hidden)
    expected = golden_all_reduce(message)
    got = reference.all_reduce(message.partials, message.scheme, message.constants)
    assert_same_bits(got, expected, f"reference, {message}")
    if ranks > 1:
        context = ParallelContext.virtual_ranks(ranks)
        for name in ("torch", "auto"):
            virtual = build_all_reduce(context, message.scheme, hidden, message.constants, name)
            assert_same_bits(virtual(torch.stack(message.partials)), expected, f"virtual ranks ({name}), {message}")


@pytest.mark.parametrize("name", [*MORE_SCHEMES, *ROTATED_SCHEMES])
def test_other_formats_equal_golden(name):
    """Both stages of formats and mixes that only have a name by the grammar."""
    for seed in range(4):
        message = draw_message(seed, 2 + seed, name, hidden=[65, 130, 576, 1][seed])
        hidden, expected = message.partials[0].shape[1], golden_all_reduce(message)
        got = reference.all_reduce(message.partials, message.scheme, message.constants)
        assert_same_bits(got, expected, f"reference, {message}")
        context = ParallelContext.virtual_ranks(len(message.partials))
        for backend in ("torch", "auto"):
            virtual = build_all_reduce(context, message.scheme, hidden, message.constants, backend)
            assert_same_bits(virtual(torch.stack(message.partials)), expected, f"virtual ranks ({backend}), {message}")


@QUICK
@given(
    bits=st.sampled_from([4, 8, 16, 32]),
    group=st.sampled_from([0, 0, 1, 2, 3, 16, 64, 128]),
    ranks=st.integers(1, 4),
    tokens=st.integers(0, 12),
    count=st.integers(0, 4),
    per_outlier=st.integers(1, 70),
    magnitude=st.sampled_from([1.0, 1e-3, 1e4, 1e37, 1e-41]),
    special=st.sampled_from([0.0, 0.01, 0.3]),
    bf16=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_backends_equal_golden(
    backend, bits, group, ranks, tokens, count, per_outlier, magnitude, special, bf16, seed
):  # fmt: skip
    """Packets, decoded values and sums of formats beyond those of the named schemes: any group, many outliers."""
    generator = torch.Generator().manual_seed(seed)
    if bits > 8:
        group = count = 0
    hidden = count * per_outlier if count else per_outlier
    outliers = torch.randperm(hidden, generator=generator)[:count].sort().values.tolist()
    wire = golden.Format(bits, group, count)
    scale_RD = None
    if bits <= 8 and group == 0:
        scale_RD = (torch.randn(ranks, hidden - count, generator=generator) * 3).exp().bfloat16().float()
    codec = codec_of(wire, hidden, backend, scale_RD, outliers)
    assert codec.layout.row_nbytes == golden.row_nbytes(wire, hidden)
    packets, expected_packets = [], []
    for rank in range(ranks):
        x = random_values((tokens, hidden), generator, magnitude, special)
        x = x.bfloat16() if bf16 else x
        scale = None if scale_RD is None else array(scale_RD[rank])
        expected_packets.append(golden.encode(array(x), wire, scale, outliers))
        packets.append(codec.encode(x, sender=rank))
        np.testing.assert_array_equal(packets[-1].numpy(), expected_packets[-1], err_msg="encode")
        expected = golden.decode(expected_packets[-1], hidden, wire, scale, outliers)
        assert_same_bits(codec.decode(packets[-1], sender=rank), expected, "decode")
    expected = golden.decode_sum(expected_packets, hidden, wire, array(scale_RD), outliers)
    assert_same_bits(codec.decode_sum(packets), expected, "decode_sum of a list")
    assert_same_bits(codec.decode_sum(torch.stack(packets)), expected, "decode_sum of a tensor")


@QUICK
@given(seed=st.integers(0, 2**32 - 1), hidden=st.sampled_from([1, 2, 64, 129]))
def test_any_bytes_decode_as_golden_says(backend, seed, hidden):
    """A damaged packet is still decoded to the same values everywhere: ranks that read it stay together."""
    generator = torch.Generator().manual_seed(seed)
    for wire in (golden.Format(4), golden.Format(4, group=64), golden.Format(8, group=128), golden.Format(16)):
        packet = torch.randint(
            256, (3, golden.row_nbytes(wire, hidden)), generator=generator, dtype=torch.uint8
        )  # fmt: skip
        scale = torch.rand(1, hidden, generator=generator).bfloat16().float() if wire == golden.Format(4) else None
        codec = codec_of(wire, hidden, backend, scale)
        expected = golden.decode(packet.numpy(), hidden, wire, None if scale is None else array(scale)[0])
        assert_same_bits(codec.decode(packet, sender=0), expected, wire)
