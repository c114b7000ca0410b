"""format_errors: what each format would lose at each sync point and stage, measured in one pass a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from lowbit_kernels import get_backend
from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.calibration.outliers import constants_from_statistics
from megatron_lowbit.comm.all_reduce import AllReduce, build_all_reduce
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.compensation import CompensatedAllReduce
from megatron_lowbit.comm.constants import NO_CONSTANTS, SyncPointConstants
from megatron_lowbit.comm.predictor import PredictorOnDevice
from megatron_lowbit.comm.rotated_codec import make_codec
from megatron_lowbit.comm.schemes import CommScheme, parse_scheme
from megatron_lowbit.comm.sync_point import Norm, join_sum
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.scheme_tuning_search import Candidate, Site
from megatron_lowbit.weights import ModelWeights

# Shapes: L ranks living in this process, T sampled tokens, H hidden features.

#: Tokens of a sequence that are encoded in all formats, spread over it.
TOKENS = 96


@dataclass
class _Tally:
    """Sums over tokens by format; reduce: over this process's ranks too."""

    reduce: list[float]
    gather: list[float]
    tokens: int = 0


@dataclass
class ErrorMeasuringAllReduce:
    """Passes the exact sum on and encodes what would have travelled in every format.

    An error counts by its energy in the residual over that of the residual: the next norm divides by it.
    """

    exact: AllReduce
    ranks: Sequence[int]
    predictor: PredictorOnDevice | None
    #: makes the codecs of the formats, reduce and gather, one pair at a time
    codecs: Sequence[Callable[[], tuple[Codec, Codec]]]
    tally: _Tally = field(init=False)

    def __post_init__(self) -> None:
        self.tally = _Tally([0.0] * len(self.codecs), [0.0] * len(self.codecs))

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
        full_TH = self.exact(partial_LTH)
        residual_TH = join_sum(full_TH, residual_TH, bias, post_norm)
        rows = torch.arange(0, full_TH.shape[0], max(1, full_TH.shape[0] // TOKENS), device=full_TH.device)
        inputs = [partial.float() for partial in partial_LTH[:, rows]]
        rest_TH = full_TH[rows]
        # by what an error of the sum is multiplied on its way to the next norm's output
        worth_TH = residual_TH[rows].square().mean(dim=1, keepdim=True).clamp_min(1e-30).rsqrt()
        if post_norm is not None:
            rms_T1 = (rest_TH.square().mean(dim=1, keepdim=True) + post_norm.eps).sqrt()
            worth_TH = worth_TH * post_norm.scale() / rms_T1
        if self.predictor is not None:
            codes_TK = self.predictor.codes(block_input_TH[rows])
            pairs = zip(self.ranks, inputs, strict=True)
            inputs = [partial_TH - self.predictor.of_rank(codes_TK, rank) for rank, partial_TH in pairs]
            rest_TH = rest_TH - self.predictor.of_sum(codes_TK)
        self.tally.tokens += len(rows)
        for index, make in enumerate(self.codecs):
            reduce_codec, gather_codec = make()
            for rank, partial_TH in zip(self.ranks, inputs, strict=True):
                self.tally.reduce[index] += _error(reduce_codec, rank, partial_TH, worth_TH)
            self.tally.gather[index] += _error(gather_codec, 0, rest_TH, worth_TH)
        return residual_TH


def format_errors(
    weights: ModelWeights,
    calibration: CommCalibration,
    formats: Sequence[Candidate],
    portable: bool,
    sequences: Sequence[Sequence[int]],
    backend: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> dict[Site, list[float]]:
    """The mean squared error of each format, relative to the residual's mean square, at each site; equal on all ranks.

    Reduce errors are summed over ranks. portable: nothing is foretold. progress: called with (done, total) sequences.
    """
    context, hidden = weights.context, weights.config.hidden_size
    exact = parse_scheme("exact").for_dtype(weights.dtype)
    kernels = get_backend(backend, context.device)
    schemes = [parse_scheme(format_.name + ("" if portable else ":predict")) for format_ in formats]
    found: dict[str, ErrorMeasuringAllReduce] = {}

    def measuring(name: str) -> ErrorMeasuringAllReduce:
        collective = build_all_reduce(context, exact, hidden, NO_CONSTANTS)
        assert not isinstance(collective, CompensatedAllReduce)
        shared: dict[tuple[int, bool], SyncPointConstants] = {}
        for scheme in schemes:
            if _kind(scheme) not in shared:
                constants = constants_from_statistics(scheme, name, calibration.sync_points[name])
                shared[_kind(scheme)] = constants.to(context.device)
        predictor = next(iter(shared.values())).predictor

        def codecs(scheme: CommScheme) -> tuple[Codec, Codec]:
            wire = scheme.reduce_stage
            constants = shared[_kind(scheme)]
            sets = constants.body_index, constants.outlier_index
            return (
                make_codec(wire, hidden, kernels, *sets, constants.reduce_scale_RD),
                make_codec(wire, hidden, kernels, *sets, constants.gather_scale_1D),
            )

        found[name] = ErrorMeasuringAllReduce(
            collective,
            list(context.local_ranks),
            None if predictor is None else predictor.to(context.device),
            [lambda scheme=scheme: codecs(scheme) for scheme in schemes],  # type: ignore[misc]
        )
        return found[name]

    model = weights.build(measuring)
    for done, sequence in enumerate(sequences):
        model(TokenBatch.prompts([sequence], context.device))
        if progress is not None:
            progress(done + 1, len(sequences))
    errors: dict[Site, list[float]] = {}
    for name, each in found.items():
        tally = each.tally
        all_ranks = context.all_gather_json(tally.reduce)
        errors[name, 0] = [sum(of_ranks) / tally.tokens for of_ranks in zip(*all_ranks, strict=True)]
        errors[name, 1] = [total / tally.tokens for total in context.broadcast_json(tally.gather)]
    return errors


def _kind(scheme: CommScheme) -> tuple[int, bool]:
    """By what the constants of prescaled formats differ, and no more."""
    return scheme.reduce_stage.outlier_divisor, bool(scheme.reduce_stage.rotation)


def _error(codec: Codec, sender: int, x_TH: torch.Tensor, worth_TH: torch.Tensor) -> float:
    """Sum over tokens of the mean square of what an encoding misses, each feature weighed by its worth."""
    arrived_TH = codec.decode(codec.encode(x_TH, sender), sender)
    return float((x_TH - arrived_TH).mul_(worth_TH).square_().sum()) / x_TH.shape[1]
