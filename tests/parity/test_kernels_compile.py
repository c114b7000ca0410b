"""The Triton kernels compile for a GPU without one at hand: to code that rounds as the reference, in whole vectors.

The backend is called as on a GPU, with the arguments of a real launch, and Triton compiles for a device that it is told
of: nothing is launched. What it would launch is read as PTX.
"""

import collections
import re
import sys

import pytest
import torch

from lowbit_kernels import PacketLayout

HIDDEN = 8192
LAYOUTS = {
    "int4": PacketLayout(HIDDEN, 4),
    "int4-outlier": PacketLayout(HIDDEN, 4, outliers=HIDDEN // 64),
    "int4-g64": PacketLayout(HIDDEN, 4, 64),
    "int8-g128": PacketLayout(HIDDEN, 8, 128),
    "int3-g64": PacketLayout(HIDDEN, 3, 64),
    "int6-prescaled": PacketLayout(HIDDEN, 6, 32, asymmetric=True, prescaled=True),
    "fp8-g128": PacketLayout(HIDDEN, 8, 128, values="e4m3"),
    "mxfp4": PacketLayout(HIDDEN, 4, 32, values="e2m1", scale_format="e8m0"),
    "nvfp4": PacketLayout(HIDDEN, 4, 16, values="e2m1", scale_format="e4m3"),
    "lm3-g64-e4m3": PacketLayout(HIDDEN, 3, 64, values="lm", scale_format="e4m3", prescaled=True),
    "lm4-g64": PacketLayout(HIDDEN, 4, 64, values="lm"),
    "nf4-token": PacketLayout(HIDDEN, 4, HIDDEN, values="nf4"),
    "tc4-g40-e4m3": PacketLayout(HIDDEN + 1, 4, 40, 3, values="tc", scale_format="e4m3", prescaled=True),
    "bf16": PacketLayout(HIDDEN, 16),
    "any": PacketLayout(HIDDEN + 1, 7, 100, 3, scale_format="e4m3", prescaled=True),
}
RANKS = 4
SM_80, SM_90 = 80, 90


class Compiler:
    """Calls steps of the Triton backend for a device of a compute capability, and returns the PTX of their kernels."""

    def __init__(self, capability, monkeypatch, folder):
        triton = pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
        runtime = pytest.importorskip("triton.runtime", reason="needs Triton's run time")
        backends = pytest.importorskip("triton.backends.compiler", reason="needs Triton 3.2 or later")
        if "nvidia" not in triton.backends.backends:
            pytest.skip("this Triton was built without its NVIDIA backend")
        from lowbit_kernels import triton_backend

        launcher = triton.runtime.jit.JITFunction
        if not isinstance(sys.modules["lowbit_kernels.encode"]._encode, launcher):
            pytest.skip("Triton's interpreter is on in this process: it has nothing to compile")
        self.backend = triton_backend
        target = backends.GPUTarget("cuda", capability, 32)

        class Device:
            def get_current_target(self):
                return target

            def get_current_device(self):
                return capability

            def get_current_stream(self, device=None):
                return 0

        run = launcher.run

        def compile_only(kernel, *arguments, grid, warmup, **options):
            compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
            self.ptx, self.launches = self.ptx + compiled.asm["ptx"], self.launches + 1
            return compiled

        monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
        monkeypatch.setattr(launcher, "run", compile_only)
        monkeypatch.setattr(runtime.driver, "_active", Device())
        self.ptx, self.launches = "", 0

    def __call__(self, step, layout, tokens, dtype=torch.bfloat16):
        """PTX of a step's kernels on `tokens` rows. Nothing is computed: tensors have but types and addresses."""
        order = torch.arange(layout.features).roll(7)
        outliers = layout.outliers
        index = [order[outliers:].contiguous(), order[:outliers].contiguous()] if outliers else [None, None]
        scale = torch.ones(RANKS, layout.body) if layout.needs_static else None
        one = None if scale is None else scale[0]
        minimum = torch.ones(RANKS, layout.body) if layout.needs_minimum else None
        x_TH = torch.empty(tokens, layout.features, dtype=dtype)
        out_TH = torch.empty(tokens, layout.features)
        packets = torch.empty(RANKS, tokens, layout.row_nbytes, dtype=torch.uint8)
        self.ptx, self.launches = "", 0
        if step == "encode":
            self.backend.encode(x_TH, layout, packets[0], one, *index)
        elif step == "decode_sum":
            self.backend.decode_sum(packets, layout, out_TH, scale, *index, minimum)
        elif step == "requantize":
            gather = {"gather_inverse_scale": one, "gather_body_index": index[0], "gather_outlier_index": index[1]}
            self.backend.requantize(packets, layout, packets[0], layout, scale, *index, minimum, **gather)
        else:
            self.backend.decode_add_norm(packets[0], layout, out_TH, x_TH, out_TH[0], 1e-5, one, *index)
        expected = 1
        if layout.has_trellis and step in ("encode", "requantize"):
            # scales, codes and planes; behind whole groups one that is not; and the sum before
            expected = 3 + (layout.body % layout.group_size > 0) + (step == "requantize")
        assert self.launches == expected
        return self.ptx


@pytest.fixture
def compiler(monkeypatch, tmp_path_factory):
    """Makes a `Compiler`; what was compiled before for another test is at hand."""
    folder = tmp_path_factory.getbasetemp() / "triton"
    return lambda capability: Compiler(capability, monkeypatch, folder)


def accesses(ptx):
    """How many loads and stores of each width, in bits for a thread, a kernel has: `{("ld", 128): 4, ...}`."""
    counts = collections.Counter()
    for kind, lanes, bits in re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)\b", ptx):
        counts[kind, int(lanes or 1) * int(bits)] += 1
    return counts


@pytest.mark.parametrize(
    "name",
    [
        *("int4-outlier", "int4-g64", "int6-prescaled", "fp8-g128", "nvfp4", "lm3-g64-e4m3", "lm4-g64", "nf4-token"),
        *("tc4-g40-e4m3", "any"),
    ],
)
@pytest.mark.parametrize("step", ["encode", "decode_sum", "requantize", "decode_add_norm"])
def test_no_fusion_no_flushing_and_true_division(compiler, step, name):
    layout = LAYOUTS[name]
    ptx = compiler(SM_90)(step, layout, 3)
    assert not re.search(r"\bfma\.|\.ftz\b|\.approx\b|\b(div|rcp|sqrt)\.full\b", ptx)
    divides = layout.group_size > 0 and step in ("encode", "requantize")
    assert bool(re.search(r"\b(div|rcp)\.rn\.f32\b", ptx)) == (divides or step == "decode_add_norm")


@pytest.mark.parametrize("step", ["encode", "decode_sum", "requantize", "decode_add_norm"])
def test_ampere(compiler, step):
    compile_for = compiler(SM_80)
    for name in ("int4-outlier", "nvfp4"):
        assert ".target sm_80" in compile_for(step, LAYOUTS[name], 3)


@pytest.mark.parametrize("tokens", [3, 4096])
@pytest.mark.parametrize("name", ["int4", "int4-g64", "nvfp4", "bf16"])
def test_values_move_in_vectors(compiler, name, tokens):
    """Values move 16 bytes a thread, and not otherwise."""
    layout, compile_for = LAYOUTS[name], compiler(SM_90)
    rows = 1 if tokens == 3 or name == "nvfp4" else 4
    for dtype in (torch.bfloat16, torch.float32):
        loads = accesses(compile_for("encode", layout, tokens, dtype))
        static = (2 if dtype == torch.bfloat16 else 1) * layout.needs_static
        assert loads["ld", 128] >= rows + static and not loads["ld", 16] + loads["ld", 32], loads
    moves = accesses(compile_for("decode_sum", layout, tokens))
    assert {width for kind, width in moves if kind == "st"} == {128}
    moves = accesses(compile_for("decode_add_norm", layout, tokens))
    assert {width for kind, width in moves if kind == "st"} == {128, 64}  # the stream, and its norm in bf16


@pytest.mark.parametrize("name", ["int4", "int4-outlier", "int4-g64", "int8-g128", "mxfp4", "nvfp4", "lm4-g64"])
def test_codes_move_in_words(compiler, name):
    """A byte of a packet is loaded by one thread once, four codes at a time, and stored eight codes at a time."""
    layout, rows, compile_for = LAYOUTS[name], 4, compiler(SM_90)
    words = accesses(compile_for("decode_sum", layout, 4096))
    width = 4 * layout.bits
    scales = {"bf16": 16, "e8m0": 8, "e4m3": 8}[layout.scale_format] if layout.group_size else 0
    row_scales = layout.row_scale_nbytes > 0
    expected = collections.Counter({width: RANKS * rows})
    expected.update({scales: RANKS * rows} if scales else {})
    expected.update({16: RANKS * rows} if row_scales else {})
    expected.update({16: RANKS} if layout.outliers else {})
    assert all(words["ld", bits] == count for bits, count in expected.items()), (words, expected)
    stored = accesses(compile_for("encode", layout, 4096))
    if name == "nvfp4":  # its rows are not multiples of 4 bytes
        assert stored["st", 32] == 0 and stored["st", 16] >= 2
    else:
        assert stored["st", 32] == rows * layout.bits // 4


@pytest.mark.parametrize("name", ["int4", "int4-g64", "int8-g128", "nvfp4", "lm3-g64-e4m3", "lm4-g64", "bf16"])
def test_nothing_moves_between_threads_to_be_summed(compiler, name):
    """A thread decodes what it stores: no shared memory, no barrier, no shuffle."""
    compile_for = compiler(SM_90)
    for tokens in (3, 4096):
        assert not re.search(r"\.shared|\bbar\.|\bshfl\.", compile_for("decode_sum", LAYOUTS[name], tokens))


@pytest.mark.parametrize("name", ["int4", "int4-g64", "int8-g128", "mxfp4", "lm4-g64"])
def test_threads_encode_whole_units_of_bf16(compiler, name):
    """A thread packs the eight values it loads; threads of a group tell each other its largest value and no more."""
    layout = LAYOUTS[name]
    ptx = compiler(SM_90)("encode", layout, 3)
    assert not re.search(r"\.shared|\bbar\.", ptx)
    exchanges = len(re.findall(r"\bshfl\.sync|\bredux\.sync", ptx))
    assert exchanges <= max(0, layout.group_size // 8).bit_length()


def test_a_layout_of_another_width_compiles_nothing_new(compiler):
    """Sizes are numbers to a kernel; what is compiled into it is how addresses divide, here always by 16."""
    compile_for = compiler(SM_90)
    for step in ("encode", "decode_sum", "requantize", "decode_add_norm"):
        layouts = [
            PacketLayout(features, 8, 0, outliers) for features, outliers in ((1056, 16), (1072, 32), (1536, 32))
        ]
        assert len({compile_for(step, layout, 2) for layout in layouts}) == 1, step


@pytest.mark.parametrize("capability", [SM_80, SM_90])
@pytest.mark.parametrize(("features", "block", "launches"), [(5120, "full", 2), (4096, "full", 1), (5000, 64, 2)])
def test_rotations(compiler, capability, features, block, launches):
    """Neither fused nor flushed, in vectors; one launch for each run."""
    compile_for = compiler(capability)
    from lowbit_kernels.rotation import Rotation
    from lowbit_kernels.triton_rotation import rotate

    for inverse in (False, True):
        compile_for.launches = 0
        rotate(torch.empty(3, features), Rotation(features, block), inverse)
        assert compile_for.launches == launches
        assert not re.search(r"\bfma\.|\.ftz\b|\.approx\b", compile_for.ptx) and re.search(
            r"add[.\w]*f32", compile_for.ptx
        )
        if block == "full":
            moves = accesses(compile_for.ptx)
            assert moves["ld", 128] and moves["st", 128] and not moves["st", 32], moves
