"""Every backend gives the bits of `reference.py`: same packets, same outputs, for all layouts and all float values."""

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.kernel_cases import FAMILIES, Case, check_case, check_norm, check_ties, same_bits

from lowbit_kernels import PacketLayout, get_backend, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CODES = [family for family in FAMILIES if family not in ("bf16", "fp32")]


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
