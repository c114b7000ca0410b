"""Triton: the values that are to be encoded, one by one: of a row of values, or of the sum of packets.

Every function runs on the device. Where a feature lies in the packets that are summed is found by a binary search among
their outliers.

Legend: T tokens, K outliers, R ranks. S tells of what is fetched, F of what it is encoded in.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from lowbit_kernels.pack import as_bits, as_float, load_bits
from lowbit_kernels.rows import Format
from lowbit_kernels.sections import Row
from lowbit_kernels.singles import outliers_below, sum_outliers, sum_values


@dataclass(frozen=True)
class Fetched:
    """What a kernel is told of the values it fetches.

    ranks: how many packets are summed, of `packets` format; 0 for rows of values, then bf16 where `is_bf16`.
    """

    ranks: int
    packets: Format | None
    is_bf16: bool


class Fetch(NamedTuple):
    """Where values come from, and what they are told apart by before they are encoded."""

    x: Any  # Rows, or the Source of a sum
    outlier_index: tl.tensor  # of the packets that are summed
    at: Row  # the sections of these packets
    body_index: tl.tensor  # of the packet that is written, as is what follows
    inverse_scale: tl.tensor


@triton.jit
def fetch_features(fetch: Fetch, token: tl.tensor, feature: tl.tensor, mask: tl.tensor, S: tl.constexpr) -> tl.tensor:
    """fp32 bits of features (int32, any block) of row `token`."""
    PACKETS: tl.constexpr = S.packets
    if S.ranks == 0:
        bits = load_bits(fetch.x.data + token * fetch.x.stride + feature, mask, S.is_bf16)
    elif PACKETS.outliers:
        k = outliers_below(fetch.outlier_index, feature, mask, fetch.at)
        near = mask & (k < fetch.at.outliers)
        is_outlier = near & (tl.load(fetch.outlier_index + k, mask=near, other=-1) == feature)
        outlier = sum_outliers(fetch.x, token, k, is_outlier, fetch.at, S.ranks)
        value = sum_values(fetch.x, token, feature - k, mask & (is_outlier == 0), fetch.at, PACKETS, S.ranks)
        bits = as_bits(tl.where(is_outlier, outlier, value))
    else:
        bits = as_bits(sum_values(fetch.x, token, feature, mask, fetch.at, PACKETS, S.ranks))
    return bits


@triton.jit
def fetch_values(
    fetch: Fetch, token: tl.tensor, value: tl.tensor, mask: tl.tensor, S: tl.constexpr, F: tl.constexpr
) -> tl.tensor:
    """fp32 bits of values number `value` (any block) of the body of row `token`, prescaled; 0 where masked."""
    feature = value
    if F.outliers:
        feature = tl.load(fetch.body_index + value, mask=mask, other=0).to(tl.int32)
    bits = fetch_features(fetch, token, feature, mask, S)
    if F.prescaled:
        bits = as_bits(as_float(bits) * tl.load(fetch.inverse_scale + value, mask=mask, other=1.0))
    return tl.where(mask, bits, 0)
