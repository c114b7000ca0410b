"""The codec as torch operators: what torch demands of them, the bits of the backend, one graph when compiled."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from lowbit_kernels import PacketLayout, get_backend, ops, reference
from lowbit_kernels.operators import Operators

TOKENS, RANKS = 3, 2
OPS = torch.ops.lowbit_kernels
LAYOUTS = [
    PacketLayout(67, 4, outliers=3),
    PacketLayout(67, 4, 16),
    PacketLayout(64, 8, 32, outliers=2),
    PacketLayout(33, 16),
    PacketLayout(33, 32),
    PacketLayout(67, 3, 16, asymmetric=True),
    PacketLayout(67, 5, asymmetric=True, outliers=5),
    PacketLayout(66, 4, 16, 2, "e2m1", "e4m3", prescaled=True),
    PacketLayout(66, 8, 32, 0, "e4m3", "e8m0"),
    PacketLayout(66, 3, 16, 2, "lm", "e4m3", prescaled=True),
    PacketLayout(64, 4, 64, values="nf4"),
    PacketLayout(67, 3, 16, 2, "tc", "e4m3", prescaled=True),
]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


class Inputs:
    """Everything the steps take for one layout, the same for the same layout."""

    def __init__(self, layout, device="cpu"):
        generator = torch.Generator().manual_seed(layout.features + layout.bits)
        self.layout, self.text = layout, ops.layout_text(layout)
        self.x_RTH = torch.randn(RANKS, TOKENS, layout.features, generator=generator).to(device)
        order = torch.randperm(layout.features, generator=generator).to(device)
        outliers = layout.outliers
        self.body_index = order[outliers:].sort().values if outliers else None
        self.outlier_index = order[:outliers].sort().values if outliers else None
        self.scale_RD = self.inverse_RD = self.minimum_RD = None
        if layout.needs_static:
            scale_RD = torch.rand(RANKS, layout.body, generator=generator) + 0.1
            self.scale_RD = scale_RD.bfloat16().float().to(device)
            self.inverse_RD = 1 / self.scale_RD
        if layout.needs_minimum:
            minimum_RD = -torch.rand(RANKS, layout.body, generator=generator)
            self.minimum_RD = minimum_RD.bfloat16().float().to(device)
        self.residual_TH = torch.randn(TOKENS, layout.features, generator=generator).to(device)
        self.weight_H = torch.rand(layout.features, generator=generator).to(device)
        self.bias_H = torch.randn(layout.features, generator=generator).to(device)
        self.packets = [OPS.encode(self.x_RTH[rank], self.text, *self.encoding(rank)) for rank in range(RANKS)]

    def statics(self, scale_RD, rank):
        """The tensors between layout and options, of one rank, or of all where `rank` is None."""
        pick = slice(None) if rank is None else rank
        scale, minimum = (None if part is None else part[pick] for part in (scale_RD, self.minimum_RD))
        return scale, self.body_index, self.outlier_index, minimum

    def encoding(self, rank=0):
        return self.statics(self.inverse_RD, rank)

    def decoding(self, rank=0):
        return self.statics(self.scale_RD, rank)

    def gathering(self):
        names = ("inverse_scale", "body_index", "outlier_index", "minimum")
        return {f"gather_{name}": part for name, part in zip(names, self.encoding(), strict=True)}

    def packet(self):
        return torch.full_like(self.packets[0], 0xAA)

    def values(self):
        return torch.full_like(self.residual_TH, torch.nan)

    def calls(self):
        """(name, arguments, options) of every operator."""
        layout, x_TH, packet_TB = self.text, self.x_RTH[0], self.packets[0]
        norm = (self.weight_H, 1e-5)
        yield "encode", (x_TH, layout, *self.encoding()), {}
        yield "encode_out", (x_TH, layout, self.packet(), *self.encoding()), {}
        yield "decode", (packet_TB, layout, *self.decoding()), {}
        yield "decode_out", (packet_TB, layout, self.residual_TH.clone(), *self.decoding()), {"add": True}
        yield "decode_sum", (self.packets, layout, *self.decoding(None)), {}
        yield "decode_sum_out", (self.packets, layout, self.values(), *self.decoding(None)), {}
        yield "requantize", (self.packets, layout, layout, *self.decoding(None)), self.gathering()
        arguments = (self.packets, layout, self.packet(), layout, *self.decoding(None))
        yield "requantize_out", arguments, self.gathering()
        arguments = (packet_TB, layout, self.residual_TH, *norm, torch.bfloat16, *self.decoding())
        yield "decode_add_norm", arguments, {"bias_H": self.bias_H}
        arguments = (packet_TB, layout, self.residual_TH.clone(), self.values(), *norm, *self.decoding())
        yield "decode_add_norm_out", arguments, {"bias_H": self.bias_H}


def same_bits(got, expected):
    return got.dtype == expected.dtype and torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def same_rows(got, expected):
    return same_bits(got.cpu().contiguous(), expected.cpu().contiguous())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_travels_as_text(layout):
    assert ops.layout_of(ops.layout_text(layout)) == layout


def test_text_that_is_no_layout_is_refused():
    with pytest.raises(ValueError, match=r"'64,4' has 2 parts; expected features,bits"):
        OPS.encode(torch.zeros(1, 64), "64,4")
    with pytest.raises(ValueError, match="codec backend 'gpu' is unknown"):
        OPS.encode(torch.zeros(1, 64), ops.layout_text(PacketLayout(64, 16)), backend="gpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_torch_accepts_every_operator(layout, device):
    """Schema (what is written, what is shared), the shapes without values, and tracing, also with symbolic sizes."""
    seen = set()
    for name, arguments, options in Inputs(layout, device).calls():
        torch.library.opcheck(getattr(OPS, name).default, arguments, options)
        seen.add(name)
    assert seen == set(ops.OPERATORS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_operators_give_the_bits_of_the_reference(layout, device):
    mine, golden = Inputs(layout, device), Inputs(layout)
    packets = []
    for rank in range(RANKS):
        packet_TB = golden.packet()
        reference.encode(golden.x_RTH[rank], layout, packet_TB, *golden.encoding(rank))
        assert same_rows(mine.packets[rank], packet_TB)
        packets.append(packet_TB)
    decoded, summed, added = golden.values(), golden.values(), golden.residual_TH.clone()
    reference.decode(packets[1], layout, decoded, *golden.decoding(1))
    reference.decode(packets[0], layout, added, *golden.decoding(), add=True)
    reference.decode_sum(packets, layout, summed, *golden.decoding(None))
    again, normed = golden.packet(), golden.values()
    reference.requantize(packets, layout, again, layout, *golden.decoding(None), **golden.gathering())
    residual = golden.residual_TH.clone()
    norm = (golden.weight_H, 1e-5)
    reference.decode_add_norm(packets[0], layout, residual, normed, *norm, *golden.decoding(), bias_H=golden.bias_H)

    got = {name: (getattr(OPS, name)(*arguments, **options), arguments) for name, arguments, options in mine.calls()}
    assert same_rows(OPS.decode(mine.packets[1], mine.text, *mine.decoding(1)), decoded)
    assert same_rows(got["encode_out"][1][2], packets[0])
    assert same_rows(got["decode_out"][1][2], added)
    assert same_rows(got["decode_sum"][0], summed) and same_rows(got["decode_sum_out"][1][2], summed)
    assert same_rows(got["requantize"][0], again) and same_rows(got["requantize_out"][1][2], again)
    assert same_rows(got["decode_add_norm"][0][0], residual) and same_rows(got["decode_add_norm_out"][1][2], residual)
    assert same_rows(mine.residual_TH, golden.residual_TH), "the form that returns new tensors wrote to its argument"
    # reductions order differently between devices: 2e-6 relative in fp32; bf16 adds its one rounding, 2^-8
    torch.testing.assert_close(got["decode_add_norm_out"][1][3].cpu(), normed, rtol=2e-6, atol=0)
    torch.testing.assert_close(got["decode_add_norm"][0][1].cpu().float(), normed, rtol=2**-8, atol=0)


def test_no_tokens():
    layout = PacketLayout(67, 4, 16)
    text = ops.layout_text(layout)
    packet_TB = OPS.encode(torch.zeros(0, 67), text)
    assert packet_TB.shape == (0, layout.row_nbytes)
    assert OPS.decode_sum([packet_TB, packet_TB], text).shape == (0, 67)
    assert OPS.requantize([packet_TB], text, text).shape == packet_TB.shape


def through_operators(inputs, codec):
    """A stage as the collectives run it: encode, sum, requantise, decode onto the residual."""
    layout = inputs.layout

    def stage(x_RTH, residual_TH):
        packets_RTB = torch.empty(RANKS, x_RTH.shape[1], layout.row_nbytes, dtype=torch.uint8, device=x_RTH.device)
        for rank in range(RANKS):
            codec.encode(x_RTH[rank] * 2, layout, packets_RTB[rank], *inputs.encoding(rank))
        summed_TH = torch.empty_like(residual_TH)
        codec.decode_sum(packets_RTB, layout, summed_TH, *inputs.decoding(None))
        packet_TB = torch.empty_like(packets_RTB[0])
        codec.requantize(packets_RTB, layout, packet_TB, layout, *inputs.decoding(None), **inputs.gathering())
        residual_TH = residual_TH.clone()
        codec.decode(packet_TB, layout, residual_TH, *inputs.decoding(), add=True)
        normed_TH = torch.empty_like(residual_TH)
        codec.decode_add_norm(
            packet_TB, layout, residual_TH, normed_TH, inputs.weight_H, 1e-5, *inputs.decoding(), bias_H=inputs.bias_H
        )
        return residual_TH + summed_TH, normed_TH

    return stage


COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(
            not any(map(shutil.which, ("c++", "g++", "clang++"))) and not torch.cuda.is_available(),
            reason="needs a C++ compiler",
        ),
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[7]], ids=str)
def test_a_compiled_stage_is_one_graph_with_the_bits_of_eager(layout, compiler, device, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inputs = Inputs(layout, device)
    stage = through_operators(inputs, Operators(get_backend("auto", device)))
    eager = stage(inputs.x_RTH, inputs.residual_TH)
    torch._dynamo.reset()
    compiled = torch.compile(stage, backend=compiler, fullgraph=True, dynamic=False)
    for _ in range(2):
        for got, expected in zip(compiled(inputs.x_RTH, inputs.residual_TH), eager, strict=True):
            assert same_rows(got, expected)


def test_token_counts_share_one_graph():
    """Symbolic T: a graph a message size would compile for minutes in a run of many lengths."""
    inputs = Inputs(PacketLayout(64, 4, 32))
    text = inputs.text
    torch._dynamo.reset()
    graphs = []

    def counting(graph, example):
        graphs.append(graph)
        return graph

    def there_and_back(x_TH):
        return OPS.decode(OPS.encode(x_TH, text), text) + 1

    compiled = torch.compile(there_and_back, backend=counting, fullgraph=True, dynamic=True)
    for tokens in (2, 3, 7):
        x_TH = torch.randn(tokens, 64)
        assert torch.equal(compiled(x_TH), there_and_back(x_TH))
    assert len(graphs) == 1


def test_operators_call_the_backend_itself_while_nobody_traces():
    calls = []

    class Codec:
        name = "torch"

        def encode(self, *arguments):
            calls.append(arguments)

    Operators(Codec()).encode(torch.zeros(1, 64), PacketLayout(64, 16), torch.zeros(1, 128, dtype=torch.uint8))
    assert len(calls) == 1


def test_everything_works_without_triton():
    """In a process of its own, where importing Triton fails as it does where it is not installed."""
    code = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else real(name, package)
import torch
from lowbit_kernels import PacketLayout, get_backend, ops
from lowbit_kernels.operators import Operators
layout = PacketLayout(64, 4, 16)
text = ops.layout_text(layout)
x = torch.randn(3, 64)
def there_and_back(x):
    packet = torch.empty(3, layout.row_nbytes, dtype=torch.uint8)
    Operators(get_backend()).encode(x, layout, packet)
    return torch.ops.lowbit_kernels.decode(packet, text)
out = torch.compile(there_and_back, backend="aot_eager")(x)
assert torch.equal(out, there_and_back(x)), out
try:
    get_backend("triton", "cpu")
except ValueError as error:
    assert "Triton is not installed" in str(error), error
else:
    raise AssertionError("Triton was found")
assert "triton" not in sys.modules
print("worked")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout == "worked\n", run.stdout + run.stderr
