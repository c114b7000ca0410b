"""Every backend gives the bits of `reference.py`: same packets, same outputs, for all layouts and all float values."""

import math
import os
import random
import subprocess
import sys

import pytest
import torch

from lowbit_kernels import PacketLayout, get_backend, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SPECIAL = [
    *(0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 3e38, -3.4028235e38, 3.3895314e38),
    *(1e-45, -1e-45, 1e-40, 1.1754944e-38, 7.9e-31, -6.3e-30, 0.5, 1.5, -2.5, 1.00390625, 1.01171875),
]
FEATURES = [1, 2, 3, 5, 16, 31, 64, 67, 130, 257, 515]


def backend_and_device(which):
    device = "cuda" if which.endswith("cuda") else "cpu"
    name = which.partition("-")[0]
    try:
        return get_backend(name, device), device
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(
    params=["triton"]
    if INTERPRETED  # Triton reads the variable when it is imported, so its interpreter gets a process of its own, below
    else ["cpu", pytest.param("triton-cuda", marks=pytest.mark.gpu), pytest.param("torch-cuda", marks=pytest.mark.gpu)]
)
def backend(request):
    if request.param.endswith("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return backend_and_device(request.param)


class Case:
    """A random layout with everything that its functions need; the same for the same seed."""

    def __init__(self, seed, bits, features=None):
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        features = features or self.rng.choice(FEATURES)
        group_size, outliers = 0, 0
        if bits <= 8:
            group_size = self.rng.choice([0, 0, 1, 3, 16, 64, 128])
            outliers = self.rng.choice([0, 0, 1, features // 8, features // 64, features])
        self.layout = PacketLayout(features, bits, group_size, min(outliers, features))
        self.tokens = self.rng.choice([0, 1, 1, 2, 5])
        self.ranks = self.rng.choice([1, 2, 3, 8])
        self.dtype = self.rng.choice([torch.float32, torch.bfloat16])
        order = torch.randperm(features, generator=self.generator)
        self.outlier_index = order[: self.layout.outliers].sort().values if self.layout.outliers else None
        self.body_index = order[self.layout.outliers :].sort().values if self.layout.outliers else None
        self.scale_RH = self.inverse_RH = None
        if self.layout.needs_static:
            exponents = torch.randn(self.ranks, self.layout.body, generator=self.generator)
            spread = self.rng.choice([1.0, 3.0, 20.0])
            self.scale_RH = (exponents * spread).exp().bfloat16().float().clamp(2.0**-120, 2.0**120)
            self.inverse_RH = 1 / self.scale_RH

    def values(self):
        shape = (self.tokens, self.layout.features)
        size = self.rng.choice([1.0, 1e-3, 1e4, 1e30, 1e-41])
        x = torch.randn(shape, generator=self.generator) * size
        if self.rng.random() < 0.3:  # products that fall on ties
            x = (x * 4).round() / 2
        share = self.rng.choice([0.0, 0.0, 0.02, 0.3])
        chosen = torch.rand(shape, generator=self.generator) < share
        special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=self.generator)]
        x = torch.where(chosen, special, x)
        if self.rng.random() < 0.1:  # any bit pattern, NaN payloads included
            x = torch.randint(-(2**31), 2**31, shape, generator=self.generator, dtype=torch.int64).int().view(x.dtype)
        return x.to(self.dtype)

    def random_packet(self):
        shape = (self.tokens, self.layout.row_nbytes)
        return torch.randint(256, shape, generator=self.generator, dtype=torch.uint8)

    def strided(self, shape, dtype, fill, device):
        """Rows that lie apart, as in a view of a wider buffer, at times."""
        apart = self.rng.choice([0, 0, 4, 8])
        return torch.full((shape[0], shape[1] + apart), fill, dtype=dtype, device=device)[:, : shape[1]]

    def encoded(self, module, x_TH, rank, device):
        packet_TB = self.strided((self.tokens, self.layout.row_nbytes), torch.uint8, 0xAA, device)
        inverse = None if self.inverse_RH is None else self.inverse_RH[rank]
        module.encode(*on(device, x_TH, self.layout, packet_TB, inverse, self.body_index, self.outlier_index))
        return packet_TB

    def decoded(self, module, packet_TB, device):
        out_TH = self.strided((self.tokens, self.layout.features), torch.float32, math.nan, device)
        scale = None if self.scale_RH is None else self.scale_RH[0]
        module.decode(*on(device, packet_TB, self.layout, out_TH, scale, self.body_index, self.outlier_index))
        return out_TH

    def summed(self, module, packets, device):
        out_TH = self.strided((self.tokens, self.layout.features), torch.float32, math.nan, device)
        packets = [packet_TB.to(device) for packet_TB in packets]
        if self.rng.random() < 0.5:
            packets = torch.stack(packets)
        tail = on(device, self.layout, out_TH, self.scale_RH, self.body_index, self.outlier_index)
        module.decode_sum(packets, *tail)
        return out_TH


def on(device, *arguments):
    return [argument.to(device) if isinstance(argument, torch.Tensor) else argument for argument in arguments]


def same_bits(got, expected):
    got = got.cpu().contiguous()
    expected = expected.contiguous()
    if got.dtype == torch.float32:
        got, expected = got.view(torch.int32), expected.view(torch.int32)
    return torch.equal(got, expected)


def check_case(case, module, device):
    packets = []
    for rank in range(case.ranks):
        x_TH = case.values()
        expected = case.encoded(reference, x_TH, rank, "cpu")
        assert same_bits(case.encoded(module, x_TH, rank, device), expected), f"encode {case.layout} {case.dtype}"
        packets.append(expected)
    noise = [case.random_packet() for _ in range(case.ranks)]
    for source in (packets, noise):
        expected = case.decoded(reference, source[0], "cpu")
        assert same_bits(case.decoded(module, source[0], device), expected), f"decode {case.layout}"
        expected = case.summed(reference, source, "cpu")
        assert same_bits(case.summed(module, source, device), expected), f"decode_sum {case.layout} R={case.ranks}"


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_random_layouts(backend, bits):
    module, device = backend
    for seed in range(16 if INTERPRETED else 200):
        check_case(Case(seed, bits), module, device)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_wider_than_a_block(backend, bits):
    module, device = backend
    for seed in range(2 if INTERPRETED else 12):
        check_case(Case(seed, bits, features=4099), module, device)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_shape_of_the_paper(backend, bits):
    """H=5120 with H/64 outliers, static scales: fixed, since random cases need not meet it."""
    module, device = backend
    case = Case(7, bits, features=5120)
    case.tokens, case.layout = 2, PacketLayout(5120, bits, 0, 80)
    order = torch.randperm(5120, generator=case.generator)
    case.outlier_index, case.body_index = order[:80].sort().values, order[80:].sort().values
    case.scale_RH = torch.rand(case.ranks, 5040, generator=case.generator).add(0.01).bfloat16().float()
    case.inverse_RH = 1 / case.scale_RH
    check_case(case, module, device)


def test_rows_do_not_depend_on_each_other(backend):
    module, device = backend
    case = Case(3, 4, features=130)
    case.tokens = 5
    x_TH = case.values().to(device)
    whole = case.encoded(module, x_TH, 0, device)
    decoded = case.decoded(module, whole, device)
    for token in range(5):
        case.tokens = 1
        assert torch.equal(case.encoded(module, x_TH[token : token + 1], 0, device), whole[token : token + 1])
        assert same_bits(case.decoded(module, whole[token : token + 1], device), decoded[token : token + 1].cpu())


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
