"""The Triton kernels compile for a GPU without one at hand, to code that cannot round otherwise than the reference."""

import re

import pytest

LAYOUTS = [(4, False, True), (4, True, True), (8, True, False), (16, False, False)]


@pytest.mark.parametrize(("bits", "grouped", "outliers"), LAYOUTS)
@pytest.mark.parametrize("step", ["encode", "decode_sum"])
def test_no_fusion_no_flushing_and_true_division(step, bits, grouped, outliers, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
    compiler = pytest.importorskip("triton.compiler", reason="needs Triton's compiler")
    backends = pytest.importorskip("triton.backends.compiler", reason="needs Triton 3.0 or later")
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton was built without its NVIDIA backend")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from lowbit_kernels.decode_sum import _decode_sum
    from lowbit_kernels.encode import _encode

    kernel = {"encode": _encode, "decode_sum": _decode_sum}[step]
    if not hasattr(kernel, "arg_names"):
        pytest.skip("Triton's interpreter is on in this process: it has nothing to compile")
    types = {
        **{"x_ptr": "*i16", "packet_ptr": "*u8", "out_ptr": "*i32", "inverse_ptr": "*fp32", "scale_ptr": "*fp32"},
        **{"body_index_ptr": "*i64", "outlier_index_ptr": "*i64"},
    }
    constants = {"IS_BF16": True, "BITS": bits, "GROUPED": grouped, "HAS_OUTLIERS": outliers, "FIRST": False}
    constants["TILE"] = 64 if grouped else 512
    if not outliers:
        constants.update(body_index_ptr=None, outlier_index_ptr=None)
    if grouped or bits > 8:
        constants.update(inverse_ptr=None, scale_ptr=None)
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items() if name in names}
    source = compiler.ASTSource(kernel, signature, values)
    target = backends.GPUTarget("cuda", 90, 32)
    ptx = triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
    assert not re.search(r"\bfma\.|\.ftz\b|\.approx\b|\bdiv\.full\b", ptx)
    assert bool(re.search(r"\bdiv\.rn\.f32\b", ptx)) == (step == "encode" and grouped)
