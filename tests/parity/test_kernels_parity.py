"""Every backend gives the bits of `reference.py`: same packets, same outputs, for all layouts and all float values."""

import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.kernel_cases import FAMILIES, Case, check_case, check_norm, check_ties, on, same_bits

from lowbit_kernels import PacketLayout, codebooks, get_backend, reference
from lowbit_kernels.foretell import Composed
from lowbit_kernels.mixed import Composed as MixedComposed
from lowbit_kernels.mixed import Mixing
from lowbit_kernels.reference_floats import unpack
from lowbit_kernels.rotation import Rotation

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CODES = [family for family in FAMILIES if family not in ("bf16", "fp32")]
#: Trellis-coded values. Triton's interpreter takes long for large groups, whose values follow one another.
TRELLIS = {
    "tc2-g16": PacketLayout(67, 2, 16, values="tc"),
    "tc3-g40-e4m3-prescaled": PacketLayout(130, 3, 40, values="tc", scale_format="e4m3", prescaled=True),
    "tc3-g24-e4m3-outlier": PacketLayout(97, 3, 24, 1, values="tc", scale_format="e4m3"),
    "tc4-g64, a row shorter than a group": PacketLayout(21, 4, 64, values="tc"),
    "tc4-g20-random-prescaled": PacketLayout(131, 4, 20, 7, values="tc", prescaled=True),
    "tc3-g2-outlier, more than a program takes": PacketLayout(1100, 3, 2, 17, values="tc"),
    "tc2-g1": PacketLayout(5, 2, 1, values="tc"),
    "tc2-g16, outliers alone": PacketLayout(9, 2, 16, 9, values="tc"),
}


@dataclass
class Subject:
    """A backend under test. `seeds`: how many random cases of a kind it gets, fewer where it is slow."""

    name: str
    module: Any
    device: str
    seeds: int

    def gather_case(self, case, seed):
        """A case of any family that the sum of `case` can be encoded in."""
        family = random.Random(seed).choice(list(FAMILIES))
        return Case(seed, family, features=case.layout.features, tokens=case.tokens)

    def check(self, case, seed):
        check_case(case, self.module, self.device, self.gather_case(case, seed))


@pytest.fixture(
    params=["triton"]
    if INTERPRETED  # Triton reads the variable when it is imported, so its interpreter gets a process of its own, below
    else ["cpu", pytest.param("triton-cuda", marks=pytest.mark.gpu), pytest.param("torch-cuda", marks=pytest.mark.gpu)]
)
def subject(request):
    name, _, device = request.param.partition("-")
    if device and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    try:
        module = get_backend(name, device or "cpu")
    except ValueError as error:
        pytest.skip(str(error))
    return Subject(name, module, device or "cpu", 6 if INTERPRETED else 150)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_layouts(subject, family):
    for seed in range(subject.seeds):
        subject.check(Case(seed, family), seed)


@pytest.mark.parametrize("family", CODES)
def test_rows_wider_than_a_block(subject, family):
    for seed in range(1 if INTERPRETED else 8):
        subject.check(Case(seed, family, features=2051 if INTERPRETED else 4099, tokens=2), seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_and_norm(subject, family):
    for seed in range(subject.seeds // 4):
        check_norm(Case(seed, family), subject.module, subject.device)


def test_ties_of_levels(subject):
    check_ties(subject.module, subject.device)


def trellis_case(name, seed, tokens=2):
    """A case of TRELLIS."""
    case = Case(seed, "int4", TRELLIS[name].features, tokens)
    case.ranks = 1 + seed % 2
    case.use_layout(TRELLIS[name])
    return case


@pytest.mark.parametrize("name", TRELLIS)
def test_trellises(subject, name):
    for seed in range(1 if INTERPRETED else 4):
        case = trellis_case(name, seed, tokens=2 if seed < 3 else 0)
        check_case(case, subject.module, subject.device, case if seed % 2 else subject.gather_case(case, seed))
        check_norm(case, subject.module, subject.device)


@pytest.mark.parametrize(("family", "name"), [("levels", "tc2-g16"), ("bf16", "tc3-g24-e4m3-outlier")])
def test_sums_of_other_packets_along_a_trellis(subject, family, name):
    gather = trellis_case(name, 1)
    case = Case(1, family, features=gather.layout.features, tokens=2)
    check_case(case, subject.module, subject.device, gather)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ties_of_a_trellis(subject, bits):
    """Values half way between levels of a subset, and between those of two, at a scale of 1."""
    levels = torch.tensor(codebooks.levels("tc", bits))
    halves = torch.cat([(levels[apart:] + levels[:-apart]) / 2 for apart in (1, 2, 4)])
    layout = PacketLayout(5 * 20, bits, 20, values="tc")
    x_TH = halves[torch.randint(len(halves), (4, layout.features), generator=torch.Generator().manual_seed(bits))]
    x_TH[:, ::20] = -1.0
    got = torch.empty(4, layout.row_nbytes, dtype=torch.uint8, device=subject.device)
    expected = torch.empty(4, layout.row_nbytes, dtype=torch.uint8)
    subject.module.encode(x_TH.to(subject.device), layout, got)
    reference.encode(x_TH, layout, expected)
    assert same_bits(got, expected)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_one_value_of_a_trellis_that_is_not_finite(subject, value):
    """Its group decodes to NaN of one pattern, and has codes 0; the others are as they were."""
    layout = PacketLayout(3 * 7, 4, 7, values="tc")
    x_TH = torch.linspace(-1, 1, 21)[None].repeat(2, 1)
    x_TH[1, 10] = value
    packet_TB = torch.empty(2, layout.row_nbytes, dtype=torch.uint8, device=subject.device)
    out_TH = torch.empty(2, 21, device=subject.device)
    subject.module.encode(x_TH.to(subject.device), layout, packet_TB)
    subject.module.decode(packet_TB, layout, out_TH)
    expected = out_TH[:1].cpu().clone()
    expected[0, 7:14] = torch.nan
    assert same_bits(out_TH[1:], expected)
    codes = unpack(packet_TB[:, : layout.codes_nbytes].cpu(), layout.planes, 21)
    assert not codes[1, 7:14].any() and codes[0, 7:14].any()


@pytest.mark.parametrize("name", ["tc3-g24-e4m3-outlier"])
def test_loops_and_rotations_of_a_trellis(subject, name):
    """What is composed of the codec's steps."""
    results = []
    for module, device in ((reference, "cpu"), (subject.module, subject.device)):
        case = trellis_case(name, 2)
        case.dtype = torch.bfloat16
        layout, index = case.layout, on(device, case.body_index, case.outlier_index)
        x_TH, packets, left = torch.randn(2, layout.features, generator=case.generator).to(device), [], []
        feedback, packet = Composed(module), (2, layout.row_nbytes)
        for _ in range(2):
            packets.append(torch.empty(packet, dtype=torch.uint8, device=device))
            left.append(torch.full_like(x_TH, 0.125))
            feedback.encode_feedback(x_TH.bfloat16(), layout, packets[-1], None, left[-1], None, None, *index)
        gather = {"gather_body_index": index[0], "gather_outlier_index": index[1]}
        packets.append(torch.empty_like(packets[0]))
        feedback.requantize_feedback(packets[:2], layout, packets[2], layout, left[1], None, *index, **gather)
        hidden = layout.features - layout.outliers
        mixing = Mixing(
            Rotation(hidden, 16), None, torch.arange(layout.outliers, device=device) if index[0] is not None else None
        )
        mixed, out_TH = MixedComposed(module), torch.ones(2, hidden, device=device)
        mixed.encode_mixed(x_TH[:, :hidden].contiguous(), layout, packets[0], mixing)
        mixed.decode_mixed(packets[:1] * 2, layout, out_TH, mixing, add=True)
        results.append([part.cpu() for part in (*packets, *left, out_TH)])
    assert all(same_bits(got, expected) for expected, got in zip(*results, strict=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_shape_of_the_paper(subject, bits):
    """H=5120 with H/64 outliers, static scales: fixed, since random cases need not meet it."""
    case = Case(7, f"int{bits}", features=5120, tokens=2)
    case.use_layout(PacketLayout(5120, bits, 0, 80))
    case.scale_RH = torch.rand(case.ranks, 5040, generator=case.generator).add(0.01).bfloat16().float()
    case.inverse_RH = 1 / case.scale_RH
    subject.check(case, 7)


def test_rows_do_not_depend_on_each_other(subject):
    for family in FAMILIES:
        case = Case(3, family, features=130, tokens=5)
        x_TH = case.values().to(subject.device)
        whole = case.encoded(subject.module, x_TH, 0, subject.device)
        decoded = case.decoded(subject.module, whole, subject.device)
        for token in range(5):
            case.tokens = 1
            row = whole[token : token + 1]
            assert torch.equal(case.encoded(subject.module, x_TH[token : token + 1], 0, subject.device), row)
            assert same_bits(case.decoded(subject.module, row, subject.device), decoded[token : token + 1].cpu())


def test_the_cases_see_a_difference():
    """The checks fail where a backend is wrong by one bit or leaves a byte of padding as it was."""

    class Wrong:
        def __init__(self, function, change):
            self.function, self.change = function, change

        def __getattr__(self, function):
            def call(*arguments, **options):
                getattr(reference, function)(*arguments, **options)
                if function == self.function:
                    self.change(arguments[2])

            return call

    def flip(tensor):
        if tensor.numel():
            tensor[-1, -1:].view(torch.uint8)[:1] ^= 1

    def check(family, module):
        case = Case(1, family, features=131, tokens=2)
        gather = Case(2, family, features=131, tokens=2)
        check_case(case, module, "cpu", gather)
        check_norm(case, module, "cpu")

    for family in FAMILIES:
        check(family, reference)
        for function in ("encode", "decode", "decode_sum", "requantize", "decode_add_norm"):
            with pytest.raises(AssertionError):
                check(family, Wrong(function, flip))


def test_triton_interpreter():
    """The same tests for the Triton kernels on a CPU."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        "-k",
        "not interpreter",
    ]
    run = subprocess.run([*command, __file__], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and " skipped" not in run.stdout, run.stdout
