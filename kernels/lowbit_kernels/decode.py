"""Triton: decode, which is the sum of one packet.

Legend: T tokens, H hidden features, K outliers, B bytes of a row.
"""

from __future__ import annotations

from torch import Tensor

from lowbit_kernels.checks import check_decode
from lowbit_kernels.decode_sum import launch_decode_sum
from lowbit_kernels.layout import PacketLayout


def decode(
    packet_TB: Tensor,
    layout: PacketLayout,
    out_TH: Tensor,
    scale: Tensor | None = None,
    body_index: Tensor | None = None,
    outlier_index: Tensor | None = None,
    minimum: Tensor | None = None,
    add: bool = False,
) -> None:
    """See `reference.decode`. Also ValueError for packet rows that are not aligned for their widest values."""
    check_decode(packet_TB, layout, out_TH, scale, body_index, outlier_index, minimum)
    scale_RH = None if scale is None else scale.unsqueeze(0)
    minimum_RH = None if minimum is None else minimum.unsqueeze(0)
    launch_decode_sum([packet_TB], layout, out_TH, scale_RH, body_index, outlier_index, minimum_RH, add)
