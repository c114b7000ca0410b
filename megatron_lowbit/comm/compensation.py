"""CompensatedAllReduce: a two-stage all-reduce that foretells, and makes up at the next sync point for what it missed.

Predictor: all ranks hold the block's input; what a calibrated map of it says of the partials is subtracted before they
travel and added behind the wire. Closed loop over depth: each sender adds what its last encoding missed to its next
partial, and a token's owner what the encoding of the last sum missed. Both cost no bytes. What is missed lives in
`LoopState`, one forward pass long. Where a norm stands between the sum and the residual (Gemma 2 and 3), errors are
kept in units of the residual and carried into the sum through that norm, and the owner sends the root mean square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lowbit_kernels.foretell import Share, unsent
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.constants import LoopLimits
from megatron_lowbit.comm.exchange import Steps
from megatron_lowbit.comm.predictor import PredictorOnDevice

# Shapes: L ranks living in this process, T tokens, P tokens of a piece, S own tokens of a piece, H hidden features, K
# numbers between a predictor's two products, B bytes of a packet row.

#: Bytes of a row's root mean square behind its packet, where a norm follows.
RMS_NBYTES = 2
#: What is carried back through a norm's small weights would be large: at most so many typical magnitudes of a feature.
OWNER_LIMIT, SENDER_LIMIT = 1.0, 4.0
#: Of the estimated scale, so much is carried: what is left stays in the loop, what is too much has to come back.
CAUTION = 0.75
#: Share of the weights' mean square below which a weight no longer counts when errors are carried back by senders.
DAMPING = 0.05
SMALLEST_WEIGHT = 1e-4


@dataclass
class LoopState:
    """What encoders missed so far in one forward pass, FP32 in units of the residual; None before the first sync point.

    missed_LTH: of this process's ranks as senders; owed_TH: of tokens' owners (on a real rank, its own rows count).
    """

    missed_LTH: torch.Tensor | None = None
    owed_TH: torch.Tensor | None = None

    def make(self, partial_LTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both, zero at first."""
        if self.missed_LTH is None or self.owed_TH is None:
            self.missed_LTH = torch.zeros(partial_LTH.shape, device=partial_LTH.device)
            self.owed_TH = torch.zeros(partial_LTH.shape[1:], device=partial_LTH.device)
        return self.missed_LTH, self.owed_TH


class PostNorm(Protocol):
    """The norm between a sum and the residual: `x / sqrt(mean(x^2) + eps) * scale()`."""

    eps: float

    def scale(self) -> torch.Tensor: ...


class Mover(Protocol):
    """`TwoStageExchange`, or its counterpart for virtual ranks: one `Steps` for each rank in this process."""

    def run_all(self, tokens: int, device: torch.device, steps: Sequence[Steps]) -> None: ...


class CompensatedAllReduce:
    """Joins the sum of all ranks' partials to the residual through `join`; needs the block's input and a `LoopState`.

    ranks: those living in this process. limits: needed where a norm follows and the loop is closed.
    """

    stages = 2

    def __init__(
        self,
        mover: Mover,
        reduce_codec: Codec,
        gather_codec: Codec,
        ranks: Sequence[int],
        predictor: PredictorOnDevice | None,
        loop: bool,
        limits: LoopLimits | None,
    ) -> None:
        self._mover = mover
        self._codecs = reduce_codec, gather_codec
        self._ranks = ranks
        self._predictor = predictor
        self._loop = loop
        self._limits = limits

    def join(
        self,
        partial_LTH: torch.Tensor,
        residual_TH: torch.Tensor,
        bias: torch.Tensor | None,
        block_input_TH: torch.Tensor,
        state: object,
        post_norm: PostNorm | None,
    ) -> torch.Tensor:
        """The FP32 residual `[T, H]` with the sum, or its norm, added in place; bit-identical on every rank."""
        assert not self._loop or isinstance(state, LoopState), state
        missed_LTH, owed_TH = state.make(partial_LTH) if self._loop and isinstance(state, LoopState) else (None, None)
        foretells = None
        if self._predictor is not None:
            # the codes of a piece with the piece, so that the first bytes leave early; once for ranks in one process
            foretells = _Foretelling(self._predictor, block_input_TH, self._codecs[0], at_once=len(self._ranks) > 1)
        call = _Call(residual_TH, foretells, owed_TH, bias)
        kind = _Steps if post_norm is None else _NormedSteps
        steps = [
            kind(
                call, self._codecs, rank, partial_LTH[row], None if missed_LTH is None else missed_LTH[row],
                post_norm, self._limits, decodes=row == 0,
            )
            for row, rank in enumerate(self._ranks)
        ]  # fmt: skip
        self._mover.run_all(partial_LTH.shape[1], partial_LTH.device, steps)
        if bias is not None and post_norm is None:
            residual_TH.add_(bias)
        return residual_TH


class _Foretelling:
    """What a predictor says in one call. `rows` of the message, each encoded before it is reduced or decoded."""

    def __init__(self, predictor: PredictorOnDevice, block_input_TH: torch.Tensor, codec: Codec, at_once: bool) -> None:
        self._predictor = predictor
        self._input_TH = block_input_TH
        self._feedback = codec.feedback
        self._at_once = at_once
        if at_once:
            self._codes_TK = predictor.codes(block_input_TH, self._feedback)
        else:
            shape = block_input_TH.shape[0], predictor.offset_K.shape[0]
            self._codes_TK = torch.empty(shape, dtype=torch.int8, device=block_input_TH.device)

    def of_rank(self, rows: slice, rank: int) -> Share:
        """Of the partials that `rank` is about to encode."""
        if not self._at_once:
            self._codes_TK[rows] = self._predictor.codes(self._input_TH[rows], self._feedback)
        return self._predictor.share_of_rank(self._codes_TK[rows], rank)

    def of_sum(self, rows: slice) -> Share:
        return self._predictor.share_of_sum(self._codes_TK[rows])


@dataclass
class _Call:
    """What the ranks of this process share in one call."""

    residual_TH: torch.Tensor
    foretells: _Foretelling | None
    owed_TH: torch.Tensor | None
    bias: torch.Tensor | None

    def share_of_rank(self, rows: slice, rank: int) -> Share | None:
        return None if self.foretells is None else self.foretells.of_rank(rows, rank)

    def share_of_sum(self, rows: slice) -> Share | None:
        return None if self.foretells is None else self.foretells.of_sum(rows)

    def foretold(self, rows: slice) -> torch.Tensor | None:
        """Of the sum."""
        share = self.share_of_sum(rows)
        return None if share is None else share.values()

    def bias_of(self, rows: slice) -> torch.Tensor | None:
        return self.bias if self.bias is None or self.bias.dim() == 1 else self.bias[rows]


class _Steps:
    """One rank's part where the sum joins the residual as it is."""

    def __init__(
        self,
        call: _Call,
        codecs: tuple[Codec, Codec],
        rank: int,
        partial_TH: torch.Tensor,
        missed_TH: torch.Tensor | None,
        post_norm: PostNorm | None,
        limits: LoopLimits | None,
        decodes: bool,
    ) -> None:
        self.call = call
        self.reduce_codec, self.gather_codec = codecs
        self.rank = rank
        self.partial_TH = partial_TH
        self.missed_TH = missed_TH
        self.decodes = decodes

    def encode(self, rows: slice, packet_PB: torch.Tensor) -> None:
        missed_PH = None if self.missed_TH is None else self.missed_TH[rows]
        share = self.call.share_of_rank(rows, self.rank)
        self.reduce_codec.encode_feedback(self.partial_TH[rows], self.rank, packet_PB, share, missed_PH)

    def reduce(self, rows: slice, packets_RSB: Sequence[torch.Tensor], packet_SB: torch.Tensor) -> None:
        owed_SH = None if self.call.owed_TH is None else self.call.owed_TH[rows]
        self.reduce_codec.requantize_feedback(packets_RSB, self.gather_codec, packet_SB, owed_SH)

    def decode(self, rows: slice, packet_PB: torch.Tensor) -> None:
        if not self.decodes:  # virtual ranks share one residual
            return
        self.gather_codec.decode_foretold(packet_PB, 0, self.call.residual_TH[rows], self.call.share_of_sum(rows))


class _NormedSteps(_Steps):
    """One rank's part where a norm stands between the sum and the residual.

    The owner sends the root mean square of the whole sum's row; all ranks divide by what was sent.
    """

    def __init__(
        self,
        call: _Call,
        codecs: tuple[Codec, Codec],
        rank: int,
        partial_TH: torch.Tensor,
        missed_TH: torch.Tensor | None,
        post_norm: PostNorm | None,
        limits: LoopLimits | None,
        decodes: bool,
    ) -> None:
        super().__init__(call, codecs, rank, partial_TH, missed_TH, post_norm, limits, decodes)
        assert post_norm is not None and (missed_TH is None or limits is not None)
        self.norm, self.limits = post_norm, limits
        self.scale_H = post_norm.scale()
        self.unsent_TH: torch.Tensor | None = None if missed_TH is None else torch.empty_like(missed_TH)

    def encode(self, rows: slice, packet_PB: torch.Tensor) -> None:
        x_PH = unsent(self.partial_TH[rows], self.call.share_of_rank(rows, self.rank), None).float()
        if self.missed_TH is None or self.limits is None or self.unsent_TH is None:
            self.reduce_codec.encode(x_PH, self.rank, packet_PB)
            return
        # the sum's root mean square is not known yet: estimated from this rank's own partial
        estimate_P1 = _rms(self.partial_TH[rows].float(), self.norm.eps) * self.limits.ratio_R[self.rank]
        rms_P1 = CAUTION * estimate_P1
        weight = self.scale_H / (self.scale_H.square() + DAMPING * self.scale_H.square().mean())
        limit_H = SENDER_LIMIT * self.limits.partial_rms_RH[self.rank]
        carried_PH = (self.missed_TH[rows] * rms_P1 * weight).clamp(-limit_H, limit_H)
        x_PH = x_PH + carried_PH
        self.reduce_codec.encode(x_PH, self.rank, packet_PB)
        # what this sync point adds to the error once the sum's scale is known: its own, less what it carried
        error_PH = x_PH - self.reduce_codec.decode(packet_PB, self.rank)
        torch.sub(error_PH, carried_PH, out=self.unsent_TH[rows])

    def reduce(self, rows: slice, packets_RSB: Sequence[torch.Tensor], packet_SB: torch.Tensor) -> None:
        rest_SH = self.reduce_codec.decode_sum(packets_RSB)
        foretold_SH, bias = self.call.foretold(rows), self.call.bias_of(rows)
        whole_SH = rest_SH if foretold_SH is None else rest_SH + foretold_SH
        whole_SH = whole_SH if bias is None else whole_SH + bias
        rms_S1 = _rms(whole_SH, self.norm.eps)
        sent_S1 = rms_S1.bfloat16()
        packet_SB[:, -RMS_NBYTES:] = sent_S1.view(torch.uint8)
        owed_TH = self.call.owed_TH
        body_SB = packet_SB[:, :-RMS_NBYTES]
        if owed_TH is None or self.limits is None:
            self.gather_codec.encode(rest_SH, 0, body_SB)
            return
        safe_H = torch.where(self.scale_H.abs() > SMALLEST_WEIGHT, self.scale_H, SMALLEST_WEIGHT)
        limit_H = OWNER_LIMIT * self.limits.sum_rms_H
        carried_SH = (owed_TH[rows] * rms_S1 / safe_H).clamp(-limit_H, limit_H)
        self.gather_codec.encode(rest_SH + carried_SH, 0, body_SB)
        arrived_SH = self.gather_codec.decode(body_SB, 0)
        if foretold_SH is not None:
            arrived_SH.add_(foretold_SH)
        if bias is not None:
            arrived_SH.add_(bias)
        meant_SH = whole_SH / rms_S1 * self.scale_H
        owed_TH[rows] += meant_SH - arrived_SH / sent_S1.float() * self.scale_H

    def decode(self, rows: slice, packet_PB: torch.Tensor) -> None:
        rms_P1 = packet_PB[:, -RMS_NBYTES:].contiguous().view(torch.bfloat16).float()
        if self.missed_TH is not None and self.unsent_TH is not None:
            self.missed_TH[rows] += self.unsent_TH[rows] / rms_P1 * self.scale_H
        if not self.decodes:
            return
        arrived_PH = self.gather_codec.decode(packet_PB[:, :-RMS_NBYTES], 0)
        foretold_PH, bias = self.call.foretold(rows), self.call.bias_of(rows)
        if foretold_PH is not None:
            arrived_PH.add_(foretold_PH)
        if bias is not None:
            arrived_PH.add_(bias)
        self.call.residual_TH[rows] += arrived_PH / rms_P1 * self.scale_H


def _rms(x_TH: torch.Tensor, eps: float) -> torch.Tensor:
    return (x_TH.square().mean(dim=1, keepdim=True) + eps).sqrt()
