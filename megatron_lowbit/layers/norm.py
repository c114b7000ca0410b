"""RMSNorm of the FP32 residual stream, of sums or of heads, through NVIDIA's apex where it is really installed."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

from megatron_lowbit.layers.sharded import ShardedModule
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sharding import TensorSource

# Shapes: H normed features, of the residual or of one head.


def nvidia_apex_is_installed() -> bool:
    """True only for NVIDIA's apex with its fused kernels; the package index's `apex` is an unrelated web toolkit."""
    if importlib.util.find_spec("apex") is None:
        return False
    return importlib.util.find_spec("fused_layer_norm_cuda") is not None


class RMSNorm(ShardedModule):
    """`x / rms(x) * (weight + offset)` over the last dimension in FP32, returned in `dtype`."""

    weight: torch.Tensor

    def __init__(
        self, context: ParallelContext, source: TensorSource, eps: float, dtype: torch.dtype, offset: float = 0.0
    ) -> None:
        super().__init__(context)
        # kept in FP32: H values a layer cost nothing, and the product is rounded only once
        self.add_parameter("weight", torch.float32, source)
        self.eps = eps
        self.dtype = dtype
        self.offset = offset
        self.use_apex = context.device.type == "cuda" and nvidia_apex_is_installed()

    def scale(self) -> torch.Tensor:
        """FP32 `[H]` that normed features are multiplied by."""
        # not folded into the stored weight: that is shared with other models, and bf16 weights near 0 keep their bits
        return self.weight + self.offset if self.offset else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: `[..., H]` of any floating-point dtype."""
        if self.use_apex:
            from apex.normalization.fused_layer_norm import fused_rms_norm_affine

            return fused_rms_norm_affine(x.float(), self.scale(), self.weight.shape, self.eps).to(self.dtype)
        return F.rms_norm(x.float(), self.weight.shape, self.scale(), self.eps).to(self.dtype)
