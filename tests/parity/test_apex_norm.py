"""RMSNorm through NVIDIA's apex, where it is installed, gives what torch gives."""

import importlib.util

import pytest
import torch

from megatron_lowbit.layers.norm import RMSNorm, nvidia_apex_is_installed
from megatron_lowbit.layers.sharded import assign_parameters
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sharding import TensorSource


def test_another_package_called_apex_is_not_taken_for_nvidias(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "apex" else real(name))
    assert nvidia_apex_is_installed() == (real("fused_layer_norm_cuda") is not None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(not nvidia_apex_is_installed(), reason="needs NVIDIA's apex")
@pytest.mark.parametrize("hidden", [64, 577, 8192])
def test_apex_equals_torch(hidden):
    context = ParallelContext.single("cuda")
    norm = RMSNorm(context, TensorSource("norm.weight", (hidden,)), 1e-5, torch.bfloat16)
    assign_parameters(norm, {"weight": torch.rand(hidden, device="cuda") + 0.5})
    x = torch.randn(33, hidden, device="cuda")
    assert norm.use_apex
    fused = norm(x)
    norm.use_apex = False
    # both compute in FP32 and round once to bf16: they may differ by that one rounding, 2^-8 relative
    torch.testing.assert_close(fused, norm(x), rtol=2**-8, atol=0)
