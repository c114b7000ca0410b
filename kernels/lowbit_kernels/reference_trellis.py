"""Trellis-coded values ("tc"): which level a code stands for depends on the codes before it, in eager torch.

A code c of B bits picks one of 2^B of a book's 2^(B+1) levels; the lowest bits of the three codes before it in the
group (0 where there are none) say which of them are there to pick from:

    level(c_t) = levels[4 (c_t >> 1) + 2 ((c_t ^ c_(t-2) ^ c_(t-3)) & 1) + (c_(t-1) & 1)]

The encoder finds the codes of least squared error of a whole group by the Viterbi algorithm over the 8 states that
three bits make: a vector quantiser of a group's length, at the price of 16 additions a value. Source: Marcellin and
Fischer, Trellis Coded Quantization of Memoryless and Gauss-Markov Sources, IEEE Transactions on Communications 38
(1990); the trellis is Ungerboeck's of 8 states, its bits named so that decoding needs four codes and no state.

Costs are fp32 sums in the order of the values. Of equal ones the state, or the one before it, of lower number is taken,
and of two equally near levels the lower. Levels that a state leads to: of each four in a row, one is in each subset.

Legend: N groups, S values of a group, B bits of a code.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

#: Of the three lowest bits that came last, the latest in a state's lowest bit.
STATES = 8
Number = TypeVar("Number", int, Tensor)


def subset(state: Number, bit: Number) -> Number:
    """Which subset (0 to 3: every fourth level, from that one on) a code with this lowest bit takes its level from."""
    return 2 * ((bit ^ state >> 1 ^ state >> 2) & 1) + (state & 1)


def trellis_codes(product_NS: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Codes (int32 `[N, S]`) of finite fp32 numbers in units of the book's levels."""
    groups, size = product_NS.shape
    books = product_NS.new_tensor(levels).view(-1, 4)
    middles = ((books[1:] + books[:-1]) / 2).t().contiguous()
    cost = product_NS.new_full((groups, STATES), torch.inf)
    cost[:, 0] = 0.0
    came_from, nearest = [], []
    for x_N in product_NS.t().contiguous():
        near = [torch.bucketize(x_N, middles[k], out_int32=True) for k in range(4)]
        errors = [x_N - books[near_N, k] for k, near_N in enumerate(near)]
        distance = [error_N * error_N for error_N in errors]
        following, before = [], []
        for state in range(STATES):  # the state that follows; its lowest bit is the code's
            low, high = state >> 1, state >> 1 | STATES >> 1
            by_low = cost[:, low] + distance[subset(low, state & 1)]
            by_high = cost[:, high] + distance[subset(high, state & 1)]
            before.append(torch.where(by_high < by_low, high, low))
            following.append(torch.minimum(by_low, by_high))
        cost = torch.stack(following, 1)
        came_from.append(torch.stack(before, 1))
        nearest.append(torch.stack(near, 1))
    codes = torch.empty(groups, size, dtype=torch.int32, device=product_NS.device)
    state_N, least_N = torch.zeros_like(codes[:, 0]).long(), cost[:, 0]
    for state in range(1, STATES):
        state_N = torch.where(cost[:, state] < least_N, state, state_N)
        least_N = torch.minimum(cost[:, state], least_N)
    for t in reversed(range(size)):
        bit_N, before_N = state_N & 1, came_from[t].gather(1, state_N[:, None])[:, 0]
        codes[:, t] = nearest[t].gather(1, subset(before_N, bit_N)[:, None])[:, 0] << 1 | bit_N
        state_N = before_N
    return codes


def trellis_places(codes: Tensor, group_size: int) -> Tensor:
    """Indices of the levels that codes (int32 `[T, D]`, the values of a row in groups) stand for."""
    bits = codes & 1
    place = torch.arange(codes.shape[1], device=codes.device) % group_size

    def earlier(count: int) -> Tensor:
        shifted = torch.nn.functional.pad(bits, (count, 0))[:, : codes.shape[1]]
        return torch.where(place >= count, shifted, 0)

    return (codes >> 1) * 4 + 2 * (bits ^ earlier(2) ^ earlier(3)) + earlier(1)
