"""Modelled time of one all-reduce: latencies, exact packet bytes over the link's rate, and the codec beside them.

    seconds = stages * latency + max(wire, codec) + min(wire, codec) / pieces

wire: the bytes that the busiest link end carries in either direction (links are full duplex), over its rate. codec:
the bytes that encoding, summing and decoding read and write on one rank, over the codec's bandwidth. A message in one
piece is encoded, then sent, then decoded: the two add up. In n pieces one is coded while others travel, and what does
not overlap is one piece's worth of the shorter of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lowbit.comm.exchange import AUTOMATIC, piece_count
from megatron_lowbit.comm.policy import Choice, Policy
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.sharding import cut_evenly


@dataclass(frozen=True)
class Link:
    """What joins one rank to the others: bytes a second each way, and the seconds that a stage costs beyond its bytes.

    overlaps: the transport moves bytes while the caller computes, so that large messages are cut into pieces.
    """

    nbytes_per_s: float
    latency_s: float
    overlaps: bool = True


@dataclass(frozen=True)
class CollectiveTime:
    """Seconds of one all-reduce and what they are made of. sent_nbytes: by the rank that sends most."""

    collective: str
    seconds: float
    latency_s: float
    wire_s: float
    codec_s: float
    sent_nbytes: int


NOTHING = CollectiveTime("", 0.0, 0.0, 0.0, 0.0, 0)


def choice_for(scheme: CommScheme, policy: Policy | None, tokens: int, hidden: int) -> Choice:
    """The collective for a message: the policy's for two-stage schemes, else the scheme's own."""
    if scheme.gather_stage is None:
        return Choice("one-stage")
    return Choice("two-stage", AUTOMATIC) if policy is None else policy.choose(tokens, hidden)


def collective_time(
    scheme: CommScheme, choice: Choice, tokens: int, hidden: int, ranks: int, link: Link, codec_nbytes_per_s: float
) -> CollectiveTime:
    """One all-reduce of `[tokens, hidden]` under `choice`, with the formats that most sync points of the scheme use.

    codec_nbytes_per_s: infinite for one that costs nothing.
    """
    if ranks == 1 or tokens == 0:
        return NOTHING
    plain_row, result_row = 2 * hidden, 4 * hidden  # bf16 partials, fp32 residual
    first_row = plain_row if choice.collective == "exact" else scheme.reduce_stage.packet_layout(hidden).row_nbytes
    pieces = 1
    if choice.collective == "two-stage":
        assert scheme.gather_stage is not None
        second_row = scheme.gather_stage.packet_layout(hidden).row_nbytes
        owned = [stop - start for start, stop in cut_evenly(tokens, ranks)]
        # reducing, a rank sends the rows of others and receives its own from all others; gathering, the reverse
        busiest = max(max(tokens - own, (ranks - 1) * own) for own in owned)
        wire_nbytes = busiest * (first_row + second_row)
        sent_nbytes = max((tokens - own) * first_row + (ranks - 1) * own * second_row for own in owned)
        # encode all; sum the own tokens of all ranks and encode them; decode all into the residual
        own = max(owned)
        coded_nbytes = tokens * (plain_row + first_row) + own * (ranks * first_row + second_row)
        coded_nbytes += tokens * (second_row + 2 * result_row)
        stages = 2
        if link.overlaps:
            pieces = piece_count(tokens, max(first_row, second_row), ranks, choice.piece_nbytes)
    else:
        sent_nbytes = wire_nbytes = (ranks - 1) * tokens * first_row
        # encode all; sum the packets of all ranks; add the sum to the residual
        coded_nbytes = tokens * (plain_row + first_row) + tokens * (ranks * first_row + result_row)
        coded_nbytes += tokens * 3 * result_row
        stages = 1
    latency, wire, codec = stages * link.latency_s, wire_nbytes / link.nbytes_per_s, coded_nbytes / codec_nbytes_per_s
    seconds = latency + max(wire, codec) + min(wire, codec) / pieces
    return CollectiveTime(choice.collective, seconds, latency, wire, codec, sent_nbytes)


def ring_time(tokens: int, hidden: int, ranks: int, link: Link) -> CollectiveTime:
    """torch's all-reduce over gloo: a ring of 2 (R - 1) steps, each of 1/R of the bf16 message."""
    if ranks == 1 or tokens == 0:
        return NOTHING
    steps = 2 * (ranks - 1)
    sent_nbytes = steps * 2 * tokens * hidden // ranks
    latency, wire = steps * link.latency_s, sent_nbytes / link.nbytes_per_s
    return CollectiveTime("ring", latency + wire, latency, wire, 0.0, sent_nbytes)
