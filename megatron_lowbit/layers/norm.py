"""RMSNorm of the FP32 residual stream, through NVIDIA's apex where it is really installed."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

from megatron_lowbit.layers.sharded import ShardedModule
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sharding import TensorSource

# Shapes: T tokens, H hidden features.


def nvidia_apex_is_installed() -> bool:
    """True only for NVIDIA's apex with its fused kernels; the package index's `apex` is an unrelated web toolkit."""
    if importlib.util.find_spec("apex") is None:
        return False
    return importlib.util.find_spec("fused_layer_norm_cuda") is not None


class RMSNorm(ShardedModule):
    """`x / rms(x) * weight` in FP32, returned in the model's dtype."""

    weight: torch.Tensor

    def __init__(self, context: ParallelContext, source: TensorSource, eps: float, dtype: torch.dtype) -> None:
        super().__init__(context)
        # kept in FP32: H values a layer cost nothing, and the product is rounded only once
        self.add_parameter("weight", torch.float32, source)
        self.eps = eps
        self.dtype = dtype
        self.use_apex = context.device.type == "cuda" and nvidia_apex_is_installed()

    def forward(self, residual_TH: torch.Tensor) -> torch.Tensor:
        if self.use_apex:
            from apex.normalization.fused_layer_norm import fused_rms_norm_affine

            return fused_rms_norm_affine(residual_TH, self.weight, self.weight.shape, self.eps).to(self.dtype)
        return F.rms_norm(residual_TH, self.weight.shape, self.weight, self.eps).to(self.dtype)
