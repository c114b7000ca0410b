"""The codec in Triton, for CUDA tensors, or for CPU tensors under Triton's interpreter. Importing it imports Triton."""

from __future__ import annotations

import os

import torch

from lowbit_kernels.decode import decode
from lowbit_kernels.decode_add_norm import decode_add_norm
from lowbit_kernels.decode_sum import decode_sum
from lowbit_kernels.encode import encode
from lowbit_kernels.requantize import requantize

__all__ = ["decode", "decode_add_norm", "decode_sum", "encode", "name", "requantize", "why_missing"]

name = "triton"


def why_missing(device: torch.device) -> str:
    """An empty string where this backend can serve `device`, else the reason, with the way out."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cuda" or (device.type == "cpu" and interpreted):
        return ""
    return "it takes CUDA tensors, or tensors on a CPU with TRITON_INTERPRET=1 set before Triton is imported (slow)"
