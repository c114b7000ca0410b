"""The kernels of the symmetric all-reduce compile for a GPU without one at hand: how they wait, signal, copy and round.

They are called as on a GPU and Triton compiles for a device that it is told of; nothing is launched.
"""

import os
import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
backends = pytest.importorskip("triton.backends.compiler", reason="needs Triton 3.2 or later")

from lowbit_kernels import PacketLayout, symmetric  # noqa: E402
from lowbit_kernels.symmetric_endpoint import Endpoint, buffer_nbytes, region_nbytes  # noqa: E402

HIDDEN, RANKS, TOKENS = 8192, 4, 16
LAYOUTS = {
    "int4-outlier": PacketLayout(HIDDEN, 4, outliers=HIDDEN // 64),
    "int4-g64": PacketLayout(HIDDEN, 4, 64),
    "int3-asymmetric": PacketLayout(HIDDEN, 3, 64, asymmetric=True),
    "fp8-g128": PacketLayout(HIDDEN, 8, 128, values="e4m3"),
    "nvfp4": PacketLayout(HIDDEN, 4, 16, values="e2m1", scale_format="e4m3"),
    "lm3-g64": PacketLayout(HIDDEN, 3, 64, values="lm"),
    "bf16": PacketLayout(HIDDEN, 16),
    "any": PacketLayout(HIDDEN + 1, 7, 100, 3, scale_format="e4m3", prescaled=True),
}
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
    pytest.mark.skipif("nvidia" not in triton.backends.backends, reason="this Triton has no NVIDIA backend"),
]


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """`compiled(layout, rank, tokens)`: PTX of the three kernels by name, and that each was launched once."""
    launcher = triton.runtime.jit.JITFunction
    target = backends.GPUTarget("cuda", 90, 32)

    class Device:
        def get_current_target(self):
            return target

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

    found = {}
    run = launcher.run

    def compile_only(kernel, *arguments, grid, warmup, **options):
        name = kernel.__name__.lstrip("_")
        assert name not in found
        found[name] = run(kernel, *arguments, grid=grid, warmup=True, **options).asm["ptx"]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launcher, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", Device())
    monkeypatch.setattr(Endpoint, "on_gpu", True)

    def compile_all(layout, rank=1, tokens=TOKENS):
        found.clear()
        region = region_nbytes(tokens, RANKS, layout.row_nbytes)
        own = torch.zeros(buffer_nbytes(region) + 16, dtype=torch.uint8)
        own = own[-own.data_ptr() % 16 :][: buffer_nbytes(region)]
        monkeypatch.setattr(Endpoint, "on_gpu", False)
        end = Endpoint.make(rank, own, [own.data_ptr()] * RANKS, tokens, region, 10**9)
        monkeypatch.setattr(Endpoint, "on_gpu", True)
        order = torch.arange(layout.features)
        index = (order[layout.outliers :], order[: layout.outliers]) if layout.outliers else (None, None)
        scale_RD = torch.ones(RANKS, layout.body) if layout.needs_static else None
        stage = symmetric.stage_of(layout, scale_RD, None, *index)
        symmetric.push_partials(end, torch.empty(tokens, layout.features, dtype=torch.bfloat16), stage)
        symmetric.push_sums(end, tokens, stage, stage)
        symmetric.take_sums(end, stage, torch.empty(tokens, layout.features))
        assert set(found) == {"push_partials", "push_sums", "take_sums"}
        return dict(found)

    return compile_all


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_kernel_a_stage_that_waits_signals_and_rounds_as_it_should(compiled, name):
    kernels = compiled(LAYOUTS[name])
    waits = {kernel: len(re.findall(r"ld\.acquire\.sys\.global\.b32", ptx)) for kernel, ptx in kernels.items()}
    # one look at the flags before the loop, one in it
    assert waits == {"push_partials": 0, "push_sums": 2, "take_sums": 2}
    signals = {kernel: len(re.findall(r"st\.release\.sys\.global\.b32", ptx)) for kernel, ptx in kernels.items()}
    assert signals == {"push_partials": 1, "push_sums": 1, "take_sums": 0}
    tickets = {kernel: re.findall(r"\batom\.global\.(\w+)\.acq_rel\.add", ptx) for kernel, ptx in kernels.items()}
    assert tickets == {"push_partials": ["sys"], "push_sums": ["gpu", "sys"], "take_sums": ["gpu"]}
    # between GPUs, narrow stores waste most of what a packet of the link carries
    assert re.search(r"st\.global\.v4\.b32", kernels["push_sums"])
    for kernel, ptx in kernels.items():
        # atomics are for tickets only: over PCIe there are none to another GPU
        assert len(re.findall(r"\b(?:atom|red)\.global", ptx)) == len(tickets[kernel])
        assert not re.search(r"\btrap\b|ld\.global\.nc", ptx)
        assert not re.search(r"\bfma\.|\.ftz\b|\.approx\b|\bdiv\.full\b", ptx), f"{kernel} could round otherwise"


@pytest.mark.parametrize(("rank", "tokens"), [(0, 1), (1, 1)])
def test_numbers_that_triton_compiles_apart(compiled, rank, tokens):
    """1 becomes a constant, multiples of 16 are told apart: all of them must compile."""
    for name in ("int4-outlier", "any"):
        compiled(LAYOUTS[name], rank, tokens)
