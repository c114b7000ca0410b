"""Observers: running value ranges and magnitudes of partial sums and of their sum, updated once a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_lowbit.calibration.predictor_fit import MomentObserver, token_weights
from megatron_lowbit.calibration.step_observer import StepObserver
from megatron_lowbit.comm.all_reduce import AllReduce
from megatron_lowbit.comm.predictor import PredictorOnDevice
from megatron_lowbit.comm.sync_point import Norm, join_sum

# Shapes: L ranks living in this process, T tokens of one sequence, H hidden features.

EMA_FACTOR = 0.01
#: Steps are fitted to one token in so many: counting magnitudes costs more than a pass does.
STEP_TOKENS = 8


class RangeObserver:
    """Exponential moving minimum and maximum per row and feature (paper section 3.1).

    The paper's factor is 0.01; `max(0.01, 1/n)` makes the first hundred sequences count equally, where a plain 0.01
    would leave the ranges near those of the first sequence.
    """

    def __init__(self) -> None:
        self.sequences = 0
        self.minimum: torch.Tensor | None = None
        self.maximum: torch.Tensor | None = None

    def update(self, values_LTH: torch.Tensor) -> None:
        """Takes in all tokens of one sequence; FP32 statistics `[L, H]`."""
        minimum_LH = values_LTH.amin(dim=1).float()
        maximum_LH = values_LTH.amax(dim=1).float()
        self.sequences += 1
        if self.minimum is None or self.maximum is None:
            self.minimum, self.maximum = minimum_LH, maximum_LH
            return
        factor = max(EMA_FACTOR, 1.0 / self.sequences)
        self.minimum.lerp_(minimum_LH, factor)
        self.maximum.lerp_(maximum_LH, factor)


class RmsObserver:
    """Mean square per row and feature over all tokens, each token of a sync point weighted alike."""

    def __init__(self) -> None:
        self.tokens = 0
        self.squares: torch.Tensor | None = None

    def update(self, values_LTH: torch.Tensor) -> None:
        """Takes in all tokens of one sequence."""
        squares_LH = values_LTH.float().square().sum(dim=1)
        self.tokens += values_LTH.shape[1]
        self.squares = squares_LH if self.squares is None else self.squares.add_(squares_LH)

    @property
    def rms(self) -> torch.Tensor:
        """FP32 `[L, H]`."""
        assert self.squares is not None
        return (self.squares / self.tokens).sqrt()


class RatioObserver:
    """By what a rank multiplies its own row's root mean square to estimate that of the sum, which it does not know yet.

    Senders carry errors by the estimate, and the share `1 - estimate / truth` of them stays behind. The factor is the
    one that leaves least of them in the mean square, with q the partial's over the sum's: sum(q) / sum(q^2). That is
    never more than there was; the plain mean of ratios would let errors grow where ranks' shares vary much.
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def update(self, partial_LTH: torch.Tensor, full_TH: torch.Tensor) -> None:
        """Takes in all tokens of one sequence."""
        partial_LT = partial_LTH.float().square().mean(dim=2).sqrt()
        share_LT = partial_LT / full_TH.square().mean(dim=1).sqrt().clamp_min(1e-30)
        sums = torch.stack((share_LT.sum(dim=1), share_LT.square().sum(dim=1)))
        self._sums = sums if self._sums is None else self._sums + sums

    @property
    def factor(self) -> torch.Tensor:
        """FP32 `[L]`; 0 for a rank whose partials are always 0."""
        assert self._sums is not None
        first, second = self._sums
        return torch.where(second > 0, first / second.clamp_min(1e-30), 0.0)


class ObservingAllReduce:
    """Passes the exact sum on and records what went through: calibration is the same model with these in place.

    moments: filled with products of inputs and partials while `fits` is set; where they are given, steps are observed
    too (memory: see `MomentObserver` and `StepObserver`).
    """

    def __init__(self, exact: AllReduce, moments: MomentObserver | None = None) -> None:
        self._exact = exact
        self._moments = moments
        self.fits = True
        self.partial, self.sum = RangeObserver(), RangeObserver()
        self.partial_rms, self.sum_rms, self.ratio = RmsObserver(), RmsObserver(), RatioObserver()
        self.partial_steps, self.sum_steps = StepObserver(), StepObserver()

    def join(
        self,
        partial_LTH: torch.Tensor,
        residual_TH: torch.Tensor,
        bias: torch.Tensor | None,
        block_input_TH: torch.Tensor,
        state: object,
        post_norm: Norm | None,
    ) -> torch.Tensor:
        """The residual as the exact collective leaves it."""
        full_TH = self._exact(partial_LTH)
        self.partial.update(partial_LTH)
        self.sum.update(full_TH.unsqueeze(0))
        self.partial_rms.update(partial_LTH)
        self.sum_rms.update(full_TH.unsqueeze(0))
        self.ratio.update(partial_LTH, full_TH)
        if self._moments is not None:
            some = slice(None, None, STEP_TOKENS)
            weight_T = token_weights(full_TH[some])
            self.partial_steps.update(partial_LTH[:, some], weight_T)
            self.sum_steps.update(full_TH[None, some], weight_T)
            if self.fits:
                self._moments.update(block_input_TH, partial_LTH, full_TH)
        return join_sum(full_TH, residual_TH, bias, post_norm)


class RestObservingAllReduce:
    """Passes the exact sum on and records what a predictor leaves of partials and sums."""

    def __init__(self, exact: AllReduce, ranks: Sequence[int], predictor: PredictorOnDevice) -> None:
        self._exact = exact
        self._ranks = ranks
        self._predictor = predictor
        self.partial_rms, self.sum_rms = RmsObserver(), RmsObserver()
        self.before, self.after = 0.0, 0.0

    def join(
        self,
        partial_LTH: torch.Tensor,
        residual_TH: torch.Tensor,
        bias: torch.Tensor | None,
        block_input_TH: torch.Tensor,
        state: object,
        post_norm: Norm | None,
    ) -> torch.Tensor:
        """The residual as the exact collective leaves it."""
        full_TH = self._exact(partial_LTH)
        codes_TK = self._predictor.codes(block_input_TH)
        rest_TH = full_TH - self._predictor.of_sum(codes_TK)
        pairs = zip(self._ranks, partial_LTH, strict=True)
        rest_LTH = torch.stack([part.float() - self._predictor.of_rank(codes_TK, rank) for rank, part in pairs])
        self.partial_rms.update(rest_LTH)
        self.sum_rms.update(rest_TH.unsqueeze(0))
        # energies token by token, each token weighing alike, as the fit weighs them
        energy_T = full_TH.square().mean(dim=1).clamp_min(1e-12)
        self.before += float(energy_T.numel())
        self.after += float((rest_TH.square().mean(dim=1) / energy_T).sum())
        return join_sum(full_TH, residual_TH, bias, post_norm)
