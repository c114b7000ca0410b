"""A captured stage replays on what its buffers hold now, not on what they held when it was captured.

Replays that read stale data are what other stacks shipped. Each one here gets new input and poisoned outputs, and is
compared with the same kernels launched one by one, at times with the reference on the CPU too.
"""

import pytest
import torch
from helpers.kernel_cases import on, same_bits

from lowbit_kernels import PacketLayout, get_backend, reference

RANKS, TOKENS, EPS = 3, 5, 1e-5
REPLAYS, REFERENCE_EVERY = 1000, 50
LAYOUTS = [
    PacketLayout(1031, 4, outliers=16),
    PacketLayout(1024, 4, 64),
    PacketLayout(1031, 8, 128),
    PacketLayout(1031, 3, 64),
    PacketLayout(1024, 5, 32, asymmetric=True),
    PacketLayout(1024, 8, 128, values="e4m3"),
    PacketLayout(1024, 4, 32, values="e2m1", scale_format="e8m0"),
    PacketLayout(1031, 4, 16, 8, values="e2m1", scale_format="e4m3", prescaled=True),
    PacketLayout(1031, 3, 64, 8, values="tc", scale_format="e4m3", prescaled=True),
    PacketLayout(1024, 16),
]


class Stage:
    """Both stages of an all-reduce on fixed buffers: `run` reads the inputs and fills every output.

    Inputs are shared with `like`, so that two stages can be compared; outputs are a stage's own.
    """

    def __init__(self, layout, module, device, like=None):
        self.layout, self.module, self.device = layout, module, device
        generator = torch.Generator().manual_seed(layout.features + layout.bits)
        order = torch.randperm(layout.features, generator=generator)
        outliers = layout.outliers
        index = (order[outliers:].sort().values, order[:outliers].sort().values) if outliers else (None, None)
        scale_RD = None
        if layout.needs_static:
            scale_RD = (torch.rand(RANKS, layout.body, generator=generator) + 0.1).bfloat16().float()
        self.index = on(device, *index)
        self.scale_RD = None if scale_RD is None else scale_RD.to(device)
        self.inverse_RD = None if scale_RD is None else (1 / scale_RD).to(device)
        self.weight_H = torch.rand(layout.features, generator=generator).to(device)
        self.bias_H = torch.rand(layout.features, generator=generator).to(device)
        if like is None:
            self.x_RTH = torch.empty(RANKS, TOKENS, layout.features, dtype=torch.bfloat16, device=device)
            self.residual_TH = torch.empty(TOKENS, layout.features, device=device)
        else:
            self.x_RTH, self.residual_TH = (part.to(device) for part in (like.x_RTH, like.residual_TH))
        values = torch.empty(TOKENS, layout.features, device=device)
        packets = torch.empty(RANKS, TOKENS, layout.row_nbytes, dtype=torch.uint8, device=device)
        self.outputs = {
            "packets": packets,
            "packet": torch.empty_like(packets[0]),
            **{name: torch.empty_like(values) for name in ("sum", "decoded", "stream", "normed")},
        }

    def run(self):
        out, layout, module = self.outputs, self.layout, self.module
        for rank in range(RANKS):
            module.encode(self.x_RTH[rank], layout, out["packets"][rank], self._row(self.inverse_RD, rank), *self.index)
        module.decode_sum(out["packets"], layout, out["sum"], self.scale_RD, *self.index)
        gather = dict(zip(("gather_body_index", "gather_outlier_index"), self.index, strict=True))
        gather["gather_inverse_scale"] = self._row(self.inverse_RD, 0)
        module.requantize(out["packets"], layout, out["packet"], layout, self.scale_RD, *self.index, **gather)
        scale = self._row(self.scale_RD, 0)
        module.decode(out["packet"], layout, out["decoded"], scale, *self.index)
        out["stream"].copy_(self.residual_TH)
        norm = (out["normed"], self.weight_H, EPS)
        module.decode_add_norm(out["packet"], layout, out["stream"], *norm, scale, *self.index, bias_H=self.bias_H)

    def poison(self):
        for output in self.outputs.values():
            output.fill_(0xAA if output.dtype == torch.uint8 else torch.nan)

    @staticmethod
    def _row(constants_RD, rank):
        return None if constants_RD is None else constants_RD[rank]


def compare(got, expected, what, normed_exactly):
    for name, output in got.items():
        if name == "normed" and not normed_exactly:
            # the sum of squares runs in another order on another device: see reference.decode_add_norm
            torch.testing.assert_close(output.cpu(), expected[name].cpu(), rtol=2e-6, atol=0, equal_nan=True)
        else:
            assert same_bits(output, expected[name].cpu()), f"{what}: {name}"


def check_replays(stage, replay, replays, reference_every):
    """`replay` stands for `stage.run`: after each, the outputs are those of its inputs of the moment."""
    generator = torch.Generator(stage.device).manual_seed(1)
    eager = Stage(stage.layout, stage.module, stage.device, like=stage)
    for turn in range(replays):
        size = 10.0 ** (turn % 7 - 3)
        stage.x_RTH.copy_(torch.randn(stage.x_RTH.shape, generator=generator, device=stage.device) * size)
        if turn % 10 == 9:  # what is not finite must surface from this message and be gone from the next
            stage.x_RTH[turn % RANKS, turn % TOKENS, turn % stage.layout.features] = torch.nan
        stage.residual_TH.copy_(torch.randn(stage.residual_TH.shape, generator=generator, device=stage.device))
        stage.poison()
        replay()
        eager.poison()
        eager.run()
        compare(stage.outputs, eager.outputs, f"replay {turn} of {stage.layout}", normed_exactly=True)
        if turn % reference_every in (0, 9):
            golden = Stage(stage.layout, reference, "cpu", like=stage)
            golden.run()
            compare(stage.outputs, golden.outputs, f"reference, replay {turn} of {stage.layout}", normed_exactly=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_thousand_replays_with_new_input(layout):
    stage = Stage(layout, get_backend("triton", "cuda"), "cuda")
    stage.x_RTH.normal_()
    stage.residual_TH.normal_()
    # kernels are compiled and loaded outside the capture, on a stream that is not the default one, as torch asks
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        stage.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stage.run()
    check_replays(stage, graph.replay, REPLAYS, REFERENCE_EVERY)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_comparison_accepts_a_stage_that_reads_its_inputs(layout):
    stage = Stage(layout, reference, "cpu")
    check_replays(stage, stage.run, replays=11, reference_every=10)


def test_the_comparison_finds_a_replay_of_stale_input():
    stage = Stage(LAYOUTS[1], reference, "cpu")
    stale = Stage(LAYOUTS[1], reference, "cpu")
    stale.x_RTH.normal_()
    stale.residual_TH.normal_()
    stale.outputs = stage.outputs
    with pytest.raises(AssertionError, match=r"replay 0 of .*: packets"):
        check_replays(stage, stale.run, replays=1, reference_every=1)


def test_the_comparison_finds_an_output_that_was_not_written():
    stage = Stage(LAYOUTS[1], reference, "cpu")
    written = dict(stage.outputs)

    def forgetful():
        stage.outputs = {**written, "decoded": torch.empty_like(written["decoded"])}
        stage.run()
        stage.outputs = written

    with pytest.raises(AssertionError, match=r"replay 0 of .*: decoded"):
        check_replays(stage, forgetful, replays=1, reference_every=1)
