"""TwoStageExchange: moves packets to each token's owner and the owners' packets to all; what is in them, `Steps` say.

A large message is cut into pieces of tokens, each reduced on its own: while the bytes of one piece are on the wire,
the next one is encoded, or an earlier one decoded. Pieces change who owns a token, and never a bit of the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_lowbit.comm.workspace import Workspace
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sharding import cut_evenly

# Shapes: R ranks, T tokens, P tokens of a piece, S own tokens of a piece, H hidden
# features, B bytes of a packet row.

REDUCE, GATHER = "reduce", "gather"
#: Where no piece size is given, a message has sqrt(packet bytes / this) pieces: what is exposed at both ends shrinks
#: with their number, what each costs adds up. From timings over 1 Gbit with 2 and 4 ranks.
AUTOMATIC_PIECE_NBYTES = 64 << 10
AUTOMATIC = 0


@dataclass
class _Piece:
    """Views of the buffers for some consecutive tokens, `rows` of the message."""

    rows: slice
    own_rows: slice  # of the message, this rank's own
    packet_PB: torch.Tensor  # this rank's partials
    outgoing: dict[int, torch.Tensor]  # rows of it, by owner
    received: dict[int, torch.Tensor]  # [S, B] from each other rank
    sources: list[torch.Tensor]  # [S, B] of all ranks in rank order, the own one included
    sum_PB: torch.Tensor  # packets of the sums, of all owners
    own_sum_SB: torch.Tensor
    incoming: dict[int, torch.Tensor]  # rows of `sum_PB`, by owner


class _Pieces(list[_Piece]):
    """All pieces of a message and the memory they share."""

    nbytes = 0


def piece_count(tokens: int, row_nbytes: int, ranks: int, piece_nbytes: int = AUTOMATIC) -> int:
    """Pieces that a message is cut into where the transport overlaps, no smaller than a token for every rank."""
    nbytes = tokens * row_nbytes
    count = nbytes / piece_nbytes if piece_nbytes else math.sqrt(nbytes / AUTOMATIC_PIECE_NBYTES)
    return max(1, min(tokens // ranks, round(count)))


class Steps(Protocol):
    """What a rank does with a message, some of its tokens (`rows`) at a time."""

    def encode(self, rows: slice, packet_PB: torch.Tensor) -> None:
        """Writes the packet of this rank's partials."""

    def reduce(self, rows: slice, packets_RSB: Sequence[torch.Tensor], packet_SB: torch.Tensor) -> None:
        """Writes the packet of the sum of one packet from each rank; `rows` are this rank's own tokens."""

    def decode(self, rows: slice, packet_PB: torch.Tensor) -> None:
        """Takes the owners' packets."""


class TwoStageExchange:
    """Two stages over real ranks. A token of a piece belongs to one rank: contiguous blocks, the first a token longer.

    reduce_row_nbytes, gather_row_nbytes: B of both stages. piece_nbytes: packet bytes after which the next piece
    starts, or AUTOMATIC; messages are not cut where the transport cannot overlap. piece_row_nbytes: what counts as a
    row's packet bytes there, by default the wider stage's: who owns a token depends on it, the piece size and T alone.
    workspace: buffers shared with other sync points. name: of the sync point, for errors.
    """

    def __init__(
        self,
        context: ParallelContext,
        reduce_row_nbytes: int,
        gather_row_nbytes: int,
        name: str = "",
        piece_nbytes: int = AUTOMATIC,
        workspace: Workspace | None = None,
        piece_row_nbytes: int | None = None,
    ) -> None:
        if piece_nbytes < 0:
            raise ValueError(f"piece size is {piece_nbytes} bytes; it must be at least 1, or 0 for automatic")
        self._context = context
        self._name = name
        self._row_nbytes = (reduce_row_nbytes, gather_row_nbytes)
        self._piece_row_nbytes = piece_row_nbytes or max(self._row_nbytes)
        self._overlaps = context.transport is not None and context.transport.overlaps
        self._piece_nbytes = piece_nbytes
        self._workspace = Workspace() if workspace is None else workspace

    def run(self, tokens: int, device: torch.device, steps: Steps) -> None:
        """Does the steps of all tokens, with the packets' journeys between them."""
        pieces = self._pieces(tokens, device)
        reducing = [self._start_reduce(piece, steps) for piece in pieces]
        # posted early, what arrives need not wait; a transport without overlap would take it for part of this stage
        gathering = [self._expect_sums(piece) for piece in pieces] if self._overlaps else []
        for piece, tickets in zip(pieces, reducing, strict=True):
            self._context.wait(tickets, self._name, REDUCE)
            steps.reduce(piece.own_rows, piece.sources, piece.own_sum_SB)
            for peer in piece.incoming:
                self._context.send(peer, piece.own_sum_SB, GATHER)
        gathering = gathering or [self._expect_sums(piece) for piece in pieces]
        for piece, tickets in zip(pieces, gathering, strict=True):
            self._context.wait(tickets, self._name, GATHER)
            # every rank decodes every packet, its own included: replicas stay bit-identical
            steps.decode(piece.rows, piece.sum_PB)
        self._context.wait(None, self._name, GATHER)

    def run_all(self, tokens: int, device: torch.device, steps: Sequence[Steps]) -> None:
        """`run` of this process's only rank."""
        (own,) = steps
        self.run(tokens, device, own)

    def _start_reduce(self, piece: _Piece, steps: Steps) -> list[int]:
        """Encodes a piece and hands it to the transport; returns the tickets of what the others send for it."""
        tickets = [self._context.receive(peer, rows) for peer, rows in piece.received.items()]
        # the rank's own partial goes through the packet too, or the sum would depend on who owns the token
        steps.encode(piece.rows, piece.packet_PB)
        for peer, rows in piece.outgoing.items():
            self._context.send(peer, rows, REDUCE)
        self._context.progress()
        return tickets

    def _expect_sums(self, piece: _Piece) -> list[int]:
        return [self._context.receive(peer, rows) for peer, rows in piece.incoming.items()]

    def _pieces(self, tokens: int, device: torch.device) -> _Pieces:
        count = 1
        if self._overlaps:
            count = piece_count(tokens, self._piece_row_nbytes, self._context.size, self._piece_nbytes)
        key = (tokens, count, self._row_nbytes, device)
        return self._workspace.get(key, lambda: self._make_pieces(tokens, count, device))

    def _make_pieces(self, tokens: int, count: int, device: torch.device) -> _Pieces:
        size, rank, peers = self._context.size, self._context.rank, self._context.peers
        packet_TB, sum_TB = (
            torch.empty(tokens, nbytes, dtype=torch.uint8, device=device) for nbytes in self._row_nbytes
        )
        pieces = _Pieces()
        pieces.nbytes = packet_TB.nbytes + sum_TB.nbytes
        for start, stop in cut_evenly(tokens, count):
            packet_PB, sum_PB = packet_TB[start:stop], sum_TB[start:stop]
            spans = [slice(*span) for span in cut_evenly(stop - start, size)]
            own = packet_PB[spans[rank]]
            received = packet_TB.new_empty(size, *own.shape)
            pieces.nbytes += received.nbytes
            pieces.append(
                _Piece(
                    slice(start, stop),
                    slice(start + spans[rank].start, start + spans[rank].stop),
                    packet_PB,
                    outgoing={peer: packet_PB[spans[peer]] for peer in peers},
                    received={peer: received[peer] for peer in peers},
                    sources=[own if peer == rank else received[peer] for peer in range(size)],
                    sum_PB=sum_PB,
                    own_sum_SB=sum_PB[spans[rank]],
                    incoming={peer: sum_PB[spans[peer]] for peer in peers},
                )
            )
        return pieces
