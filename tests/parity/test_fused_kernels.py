"""The fast ways of the Triton kernels give the bits of `reference.py`, at the sizes where they change their ways.

Random layouts (`test_kernels_parity`) rarely divide into units, tiles and words. These do, and a general kernel that
stepped in for a fast one would fail the test.
"""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from helpers.kernel_cases import Case, check_case, check_norm

from lowbit_kernels import PacketLayout, get_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDTH = 1096  # more than one tile of every kernel, and the last one is cut at a unit of eight
LAYOUTS = {
    "int4": PacketLayout(WIDTH, 4),
    "int4 outliers": PacketLayout(WIDTH, 4, outliers=32),
    "int4 groups": PacketLayout(WIDTH, 4, 64),
    "int4 groups, outliers": PacketLayout(WIDTH, 4, 64, outliers=32),
    "int8 groups": PacketLayout(WIDTH, 8, 128),
    "int8": PacketLayout(WIDTH, 8),
    "int3 groups": PacketLayout(WIDTH, 3, 64),
    "int2": PacketLayout(WIDTH, 2, asymmetric=True),
    "int5 minimum": PacketLayout(WIDTH, 5, asymmetric=True),
    "int6 prescaled": PacketLayout(WIDTH, 6, 32, asymmetric=True, prescaled=True),
    "int7 e8m0": PacketLayout(WIDTH, 7, 8, scale_format="e8m0"),
    "fp8": PacketLayout(WIDTH, 8, 128, values="e4m3"),
    "fp8 static": PacketLayout(WIDTH, 8, values="e4m3", outliers=8),
    "mxfp4": PacketLayout(WIDTH, 4, 32, values="e2m1", scale_format="e8m0"),
    "nvfp4": PacketLayout(WIDTH, 4, 16, values="e2m1", scale_format="e4m3"),
    "nvfp4 prescaled": PacketLayout(WIDTH, 4, 16, 32, values="e2m1", scale_format="e4m3", prescaled=True),
    "fp4 static": PacketLayout(WIDTH, 4, values="e2m1"),
    "wide groups": PacketLayout(WIDTH, 4, 1024),
    "bf16": PacketLayout(WIDTH, 16),
    "fp32": PacketLayout(WIDTH, 32),
}
#: What each layout without outliers is encoded again in, and each with as many.
GATHER = {0: PacketLayout(WIDTH, 8, 64, asymmetric=True), 32: PacketLayout(WIDTH, 8, 32, 32), 8: LAYOUTS["fp8 static"]}


@pytest.fixture(params=["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy, which interprets, mentions every overflow
    return request.param


@pytest.fixture
def kernels(device, monkeypatch):
    """The Triton backend, without the general encoder."""
    module = get_backend("triton", device)

    def refuse(*arguments):
        raise AssertionError("a fast kernel was expected to do this")

    for name in ("encode", "requantize"):
        monkeypatch.setattr(sys.modules[f"lowbit_kernels.{name}"], "launch_encode_any", refuse)
    return module


def case_of(layout, seed, device, tokens=2, index=None):
    """A case of this layout; `index`, if given, is a case whose outliers it shares, in the very same tensors."""
    case = Case(seed, "int4", features=layout.features, tokens=tokens)
    case.ranks = 1 + seed % 2
    case.use_layout(layout)
    if index is None and layout.outliers:
        case.body_index, case.outlier_index = case.body_index.to(device), case.outlier_index.to(device)
    elif layout.outliers:
        case.body_index, case.outlier_index = index.body_index, index.outlier_index
    return case


def check(layout, gather_layout, seed, module, device, tokens=2):
    case = case_of(layout, seed, device, tokens)
    check_case(case, module, device, case_of(gather_layout, seed, device, tokens, index=case))


def patch(monkeypatch, name, value, *modules):
    for module in modules:
        monkeypatch.setattr(sys.modules[f"lowbit_kernels.{module}"], name, value)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_format(kernels, device, name):
    layout = LAYOUTS[name]
    gather = GATHER[layout.outliers] if len(name) % 2 else layout
    for seed in range(1, 2 if INTERPRETED else 4):
        check(layout, gather, seed, kernels, device)
    check_norm(case_of(layout, 3, device), kernels, device)


@pytest.mark.parametrize("name", ["int4 outliers", "int4 groups", "fp8 static", "bf16"])
def test_several_rows_for_a_program(kernels, device, name, monkeypatch):
    """5 rows of 4 a program, with strides compiled in: the last program has one row."""
    patch(monkeypatch, "rows_of_program", lambda tokens, tiles: 4, "decode_sum", "encode", "requantize")
    check(LAYOUTS[name], LAYOUTS[name], 1, kernels, device, tokens=5)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4 prescaled"])
def test_rows_longer_than_a_tile_that_is_judged(kernels, device, name, monkeypatch):
    """Scales in e4m3 take two passes over a row that does not fit the registers of a program."""
    patch(monkeypatch, "JUDGED_TILE", 512, "encode", "requantize")
    check(LAYOUTS[name], LAYOUTS[name], 1, kernels, device)


@pytest.mark.parametrize("name", ["int4 outliers", "nvfp4"])
def test_rows_longer_than_those_that_stay_in_registers(kernels, device, name, monkeypatch):
    patch(monkeypatch, "MOST_TILES", 1, "decode_add_norm")
    check_norm(case_of(LAYOUTS[name], 3, device), kernels, device)


def test_many_rows_to_normalise(kernels, device, monkeypatch):
    """Past FEW_TOKENS, loads wait for the stores of the tile before."""
    patch(monkeypatch, "FEW_TOKENS", 1, "decode_add_norm")
    for name in ("int4 outliers", "int8 groups"):
        check_norm(case_of(LAYOUTS[name], 3, device), kernels, device)


@pytest.mark.parametrize("where", ["together", "at the ends", "all"])
def test_outliers_anywhere(kernels, device, where, monkeypatch):
    """More outliers between the features of a tile than one step takes, none in others, or no body at all."""
    count = WIDTH if where == "all" else 304
    layout = PacketLayout(WIDTH, 4, 0, count)
    case = case_of(layout, 1, device)
    order = torch.arange(WIDTH)
    if where == "together":
        order = order.roll(-200)
    elif where == "at the ends":
        order = order.roll(300)
    case.outlier_index, case.body_index = (
        part.sort().values.to(device) for part in order.split([count, WIDTH - count])
    )
    check_case(case, kernels, device, case)
    check_norm(case, kernels, device)


@pytest.mark.parametrize("name", ["int8 groups", "fp8", "int4", "int6 prescaled"])
def test_rows_at_odd_halves_of_words(kernels, device, name):
    """Rows 2 bytes off a multiple of 4: words of codes are loaded and stored in halves."""
    case = case_of(LAYOUTS[name], 2, device)
    strided = case.strided

    def apart(shape, dtype, fill, device):
        rows = strided(shape, dtype, fill, device)
        if dtype != torch.uint8:
            return rows
        return torch.full((shape[0], shape[1] + 2), fill, dtype=dtype, device=device)[:, : shape[1]]

    case.strided = apart
    check_case(case, kernels, device, case)


def test_triton_interpreter():
    """The same tests on a CPU, in a process of its own: Triton reads the variable when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-k", "not interpreter"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and " skipped" not in run.stdout, run.stdout
