"""Triton: the residual stream of a token, which a packet joins and which is normalised then.

Every function runs on the device. `value`, `feature` and `mask` are blocks of one shape.

Legend: T tokens, K outliers.
"""

# mypy: allow-untyped-decorators
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from lowbit_kernels.pack import as_bits, as_float, bf16_bits, one_nan
from lowbit_kernels.quads import sum_quads
from lowbit_kernels.rows import Source
from lowbit_kernels.sections import Row
from lowbit_kernels.singles import sum_outliers, sum_values


class Stream(NamedTuple):
    """A row of the stream (bits of fp32), of its norms (bits of fp32 or bf16), weights and bias of the features."""

    row: tl.tensor
    normed: tl.tensor
    weight: tl.tensor
    bias: tl.tensor  # or None
    body_index: tl.tensor
    outlier_index: tl.tensor


@triton.jit
def features_of_tile(
    stream: Stream, start: tl.tensor, at: Row, F: tl.constexpr, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Features of the values of a tile, and which of these there are; in two dimensions as in `decode_sum`."""
    feature = start + tl.arange(0, TILE)
    mask = feature // F.unit < at.body // F.unit
    if F.outliers:
        feature = (start + tl.arange(0, TILE))[None, :]
        mask = feature < at.body
        feature = tl.load(stream.body_index + feature, mask=mask, other=0).to(tl.int32)
    return feature, mask


@triton.jit
def decode_tile(
    source: Source,
    token: tl.tensor,
    start: tl.tensor,
    at: Row,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    IN_QUADS: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """fp32 values of a tile, in the shape of `features_of_tile`."""
    if IN_QUADS:
        totals = sum_quads(source, token, token + 1, start, at, F, GROUP, 1, 1, TILE // 4)
        decoded = totals[0]
    else:
        value = start + tl.arange(0, TILE)
        decoded = sum_values(source, token, value, value < at.body, at, F, 1)
    if F.outliers:
        decoded = tl.reshape(decoded, (1, TILE))
    return decoded


@triton.jit
def load_stream(stream: Stream, feature: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """fp32 values of the stream."""
    return as_float(tl.load(stream.row + feature, mask=mask))


@triton.jit
def join(stream: Stream, value: tl.tensor, old: tl.tensor, feature: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Write `old + (value + bias)` to the stream, and return what it holds then (fp32), 0 where masked."""
    if stream.bias is not None:
        value = value + tl.load(stream.bias + feature, mask=mask)
    joined = one_nan(old + value)
    tl.store(stream.row + feature, joined, mask=mask)
    return tl.where(mask, as_float(joined), 0.0)


@triton.jit
def join_tile(
    stream: Stream,
    source: Source,
    token: tl.tensor,
    start: tl.tensor,
    at: Row,
    F: tl.constexpr,
    GROUP: tl.constexpr,
    IN_QUADS: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """`join` a tile; returns the sum of the squares that the stream holds there."""
    feature, mask = features_of_tile(stream, start, at, F, TILE)
    old = load_stream(stream, feature, mask)
    joined = join(stream, decode_tile(source, token, start, at, F, GROUP, IN_QUADS, TILE), old, feature, mask)
    return tl.sum(tl.reshape(joined * joined, (TILE,)), axis=0)


@triton.jit
def load_outliers(
    stream: Stream, source: Source, token: tl.tensor, k: tl.tensor, at: Row
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Values of outliers number `k`, their features, and what the stream holds there."""
    mask = k < at.outliers
    feature = tl.load(stream.outlier_index + k, mask=mask, other=0)
    return sum_outliers(source, token, k, mask, at, 1), feature, load_stream(stream, feature, mask)


@triton.jit
def join_outliers(
    stream: Stream, source: Source, token: tl.tensor, first: tl.tensor, at: Row, OUTLIERS: tl.constexpr
) -> tl.tensor:
    """`join` some outliers; returns the sum of the squares that the stream holds there."""
    k = first + tl.arange(0, OUTLIERS)
    value, feature, old = load_outliers(stream, source, token, k, at)
    joined = join(stream, value, old, feature, k < at.outliers)
    return tl.sum(joined * joined, axis=0)


@triton.jit
def inverse_root(squares: tl.tensor, at: Row, eps: tl.tensor) -> tl.tensor:
    """1 / sqrt(mean + eps) of a sum of squares, a scalar, each step correctly rounded."""
    mean = tl.div_rn(squares, (at.body + at.outliers).to(tl.float32))
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def store_norm(stream: Stream, x: tl.tensor, feature: tl.tensor, mask: tl.tensor, IS_BF16: tl.constexpr) -> None:
    """Write norms."""
    if IS_BF16:
        tl.store(stream.normed + feature, bf16_bits(as_bits(x)).to(tl.int16), mask=mask)
    else:
        tl.store(stream.normed + feature, one_nan(x), mask=mask)


@triton.jit
def normalise(stream: Stream, inverse: tl.tensor, feature: tl.tensor, mask: tl.tensor, IS_BF16: tl.constexpr) -> None:
    """Write the norms of what the stream holds."""
    x = load_stream(stream, feature, mask) * inverse * tl.load(stream.weight + feature, mask=mask)
    store_norm(stream, x, feature, mask, IS_BF16)


@triton.jit
def normalise_tile(
    stream: Stream,
    inverse: tl.tensor,
    start: tl.tensor,
    at: Row,
    F: tl.constexpr,
    IS_BF16: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """`normalise` a tile."""
    feature, mask = features_of_tile(stream, start, at, F, TILE)
    normalise(stream, inverse, feature, mask, IS_BF16)


@triton.jit
def normalise_outliers(
    stream: Stream, inverse: tl.tensor, first: tl.tensor, at: Row, IS_BF16: tl.constexpr, OUTLIERS: tl.constexpr
) -> None:
    """`normalise` some outliers."""
    k = first + tl.arange(0, OUTLIERS)
    feature = tl.load(stream.outlier_index + k, mask=k < at.outliers, other=0)
    normalise(stream, inverse, feature, k < at.outliers, IS_BF16)
