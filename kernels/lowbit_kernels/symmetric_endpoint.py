"""Endpoint: one rank's end of the buffers that a group of GPUs shares, as `symmetric.py` uses it. Imports Triton.

Legend: T tokens, R ranks, B bytes of a packet row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lowbit_kernels.layout import PacketLayout
from lowbit_kernels.symmetric_kernels import HEADER_NBYTES, Link
from lowbit_kernels.symmetric_signals import MAX_RANKS, STATE_WORDS

#: Programs a multiprocessor gets, at most: enough to hide the time that memory takes.
PROGRAMS = 8


@dataclass(frozen=True)
class Endpoint:
    """One rank's end of the buffers of its group. Made by `make`; what it holds is changed by kernels only."""

    rank: int
    ranks: int
    own: Tensor
    table: Tensor
    state: Tensor
    tickets: Tensor
    status: Tensor  # int32 [2, R] on the host, where it can be read at any time: ranks that did not signal in time
    tokens: int
    region_nbytes: int
    timeout_ns: int
    programs: int

    @classmethod
    def make(
        cls, rank: int, own: Tensor, addresses: Sequence[int], tokens: int, region_nbytes: int, timeout_ns: int
    ) -> Endpoint:
        """own: uint8 buffer of this rank, zeroed, of `buffer_nbytes(region_nbytes)`. addresses: of all ranks' buffers.

        tokens: the most that a message has. Raises ValueError for a buffer of another size, or for too many ranks.
        """
        ranks, device = len(addresses), own.device
        if ranks > MAX_RANKS:
            raise ValueError(f"{ranks} ranks; at most {MAX_RANKS} can share symmetric buffers")
        if own.nbytes != buffer_nbytes(region_nbytes) or region_nbytes % 16 or own.data_ptr() % 16:
            raise ValueError(
                f"buffer of {own.nbytes} bytes at address {own.data_ptr()} for regions of {region_nbytes} bytes; "
                f"needed are {buffer_nbytes(region_nbytes)} bytes, the address and the region in multiples of 16"
            )
        on_gpu = device.type == "cuda"
        units = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
        return cls(
            rank,
            ranks,
            own,
            torch.tensor(addresses, dtype=torch.int64, device=device),
            torch.zeros(STATE_WORDS, dtype=torch.int32, device=device),
            torch.zeros(triton.cdiv(tokens, ranks), dtype=torch.int32, device=device),
            torch.zeros(2, ranks, dtype=torch.int32, pin_memory=on_gpu),
            tokens,
            region_nbytes,
            timeout_ns,
            PROGRAMS * units,
        )

    @property
    def on_gpu(self) -> bool:
        """False where the buffers are in host memory, for Triton's interpreter."""
        return self.own.device.type == "cuda"

    def region(self, which: int) -> Tensor:
        """Bytes of region 0 (packets of all ranks for this one's tokens) or 1 (packets of all sums)."""
        start = HEADER_NBYTES.value + which * self.region_nbytes
        return self.own[start : start + self.region_nbytes]

    def lost_ranks(self) -> list[int]:
        """Ranks that a kernel has given up waiting for. Looks at host memory: no synchronisation."""
        return self.status.any(dim=0).nonzero().flatten().tolist() if self.status.any() else []

    def most_tokens(self, row_nbytes: int) -> int:
        """The most tokens that a message in rows of `row_nbytes` bytes may have."""
        each = self.region_nbytes // row_stride(row_nbytes) // self.ranks  # tokens that every rank can own
        return min(self.tokens, self.ranks * each)

    def check(self, tokens: int, layout: PacketLayout) -> None:
        """Raise ValueError where packets of so many tokens do not fit."""
        most = self.most_tokens(layout.row_nbytes)
        if tokens > most:
            raise ValueError(
                f"{tokens} tokens in rows of {layout.row_nbytes} bytes exceed what was reserved for {self.ranks} "
                f"ranks: {self.tokens} tokens, {self.region_nbytes} bytes, so {most} of these; "
                "send fewer at a time, or make the buffers for more"
            )

    def link(self, waits_for: int) -> Link:
        """What a kernel is told, that waits for the signals of stage `waits_for`."""
        return Link(
            self.own, self.table, self.state, self.tickets, self.status[waits_for],
            self.region_nbytes, self.rank, self.ranks, self.timeout_ns,
        )  # fmt: skip


def row_stride(row_nbytes: int) -> int:
    """Bytes from one packet row to the next: a multiple of 16."""
    return triton.cdiv(row_nbytes, 16) * 16


def region_nbytes(tokens: int, ranks: int, row_nbytes: int) -> int:
    """Bytes of a region that holds messages of up to `tokens` tokens: the packets of all ranks for an owner's share."""
    return ranks * triton.cdiv(tokens, ranks) * row_stride(row_nbytes)


def buffer_nbytes(region_nbytes: int) -> int:
    """Bytes of a rank's buffer: flags and two regions."""
    return HEADER_NBYTES.value + 2 * region_nbytes
