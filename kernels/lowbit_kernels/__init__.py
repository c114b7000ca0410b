"""Packets of low-bit values: their layout, and the codecs (torch, compiled C, Triton) that write and read them.

Knows tensors and integers only. Importing it imports neither Triton nor the compiled library; `get_backend` does.
"""

from lowbit_kernels.backends import Backend, get_backend
from lowbit_kernels.layout import PacketLayout

__all__ = ["Backend", "PacketLayout", "get_backend"]
