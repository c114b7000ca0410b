"""Chains of sync points for collectives that compensate: partials that follow a block input, some behind norms."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from helpers.messages import digest

from megatron_lowbit.calibration.artifact import SyncPointStatistics
from megatron_lowbit.calibration.moments import SyncPointMoments
from megatron_lowbit.calibration.outliers import constants_from_statistics
from megatron_lowbit.calibration.predictor_fit import MomentObserver, fit_predictor
from megatron_lowbit.calibration.step_observer import StepObserver
from megatron_lowbit.comm.all_reduce import build_all_reduce
from megatron_lowbit.comm.compensation import LoopState
from megatron_lowbit.comm.schemes import CommScheme, parse_scheme
from megatron_lowbit.comm.sync_point import SyncPoint
from megatron_lowbit.parallel import ParallelContext

SCHEMES = (
    "int4-g64-prescaled:loop", "int4-g64-prescaled:predict=5", "int4-g40-e4m3-prescaled:predict=7:loop",
    "int4-outlier:loop", "int3-g32+int5-g32:predict=3:loop", "int4-g16-prescaled-outlier:loop:predict=8",
    "int4-g40-e4m3-prescaled-rotated:predict=6:loop", "int4-g32-hadamard16-outlier+int5-g32-outlier:loop",
    "int3-g32+int4-g16-prescaled-outlier-rotated:loop:predict=5", "lm4-g40-e4m3-prescaled:predict=8:loop",
    "lm3-g40-e4m3-prescaled0.7:centred:loop", "int4-fitted-outlier32:centred", "int5-fitted:predict=4:loop",
    "tc3-g40-e4m3-prescaled:predict=6:loop:last=tc4-g32-prescaled-rotated",
    "lm3-g32-prescaled:predict=4:loop:first=lm4-g40-e4m3-prescaled0.6:last=int7-g32-prescaled+int6-g64-rotated",
)  # fmt: skip


class Norm:
    """RMSNorm with weights of its own."""

    eps = 1e-5

    def __init__(self, weight_H: torch.Tensor) -> None:
        self.weight_H = weight_H

    def scale(self) -> torch.Tensor:
        return self.weight_H

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x_TH, self.weight_H.shape, self.weight_H, self.eps)


@dataclass
class Chain:
    """`points` sync points in a row; `partials[p]` is `[R, T, H]` bf16, `inputs[p]` what the block saw."""

    scheme: str
    ranks: int
    inputs: list[torch.Tensor]
    partials: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    norms: list[Norm | None]
    statistics: list[SyncPointStatistics]
    residual_TH: torch.Tensor

    def exact(self) -> torch.Tensor:
        """The residual behind the last point without any loss, FP32."""
        residual_TH = self.residual_TH.clone()
        for partial, bias, norm in zip(self.partials, self.biases, self.norms, strict=True):
            whole = partial.float().sum(dim=0) + (0 if bias is None else bias)
            residual_TH += whole if norm is None else norm(whole)
        return residual_TH

    def scheme_at(self, number: int) -> CommScheme:
        """Of point `number`, whose name is `p` and that."""
        names = [f"p{point}" for point in range(len(self.partials))]
        return parse_scheme(self.scheme).at(names[number], names)

    def run(self, context: ParallelContext, rows: slice = slice(None)) -> list[torch.Tensor]:
        """The residual behind each point, of some of the tokens."""
        state, residual_TH, seen = LoopState(), self.residual_TH[rows].clone(), []
        local = list(context.local_ranks)
        for number, (partial, bias, norm) in enumerate(zip(self.partials, self.biases, self.norms, strict=True)):
            scheme = self.scheme_at(number)
            constants = constants_from_statistics(scheme, f"p{number}", self.statistics[number])
            all_reduce = build_all_reduce(
                context, scheme, partial.shape[2], constants, name=f"p{number}", post_norm=norm is not None
            )
            bias = bias if bias is None or bias.dim() == 1 else bias[rows]
            point = SyncPoint(f"p{number}", all_reduce, norm)
            residual_TH = point.add(
                partial[local][:, rows].contiguous(), residual_TH, bias, self.inputs[number][rows], state
            )
            seen.append(residual_TH.clone())
        return seen


def draw_chain(seed: int, ranks: int, tokens: int, hidden: int, normed: bool, points: int = 5) -> Chain:
    """A chain whose partials are mostly a map of low rank of the inputs, the same for a seed everywhere."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    scheme = SCHEMES[seed % len(SCHEMES)]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    width = normal(hidden).exp()  # features of very different magnitude
    inputs, partials, statistics, biases, norms = [], [], [], [], []
    for _ in range(points):
        first, second = normal(hidden, 4) / hidden**0.5, normal(4, ranks * hidden)

        def block(count: int, first: torch.Tensor = first, second: torch.Tensor = second) -> Any:
            h = normal(count, hidden).bfloat16()
            mapped = (h.float() @ first @ second).view(count, ranks, hidden).permute(1, 0, 2)
            return h, ((mapped + 0.5 * normal(ranks, count, hidden)) * width).bfloat16()

        statistics.append(_statistics(*block(200)))
        h, partial = block(tokens)
        inputs.append(h)
        partials.append(partial)
        biases.append(rng.choice([None, normal(hidden), normal(tokens, hidden)]))
        norms.append(Norm(normal(hidden).abs() + 0.05) if normed else None)
    return Chain(scheme, ranks, inputs, partials, biases, norms, statistics, normal(tokens, hidden))


def _statistics(h: torch.Tensor, partial: torch.Tensor) -> SyncPointStatistics:
    total = partial.float().sum(dim=0)
    moments = MomentObserver()
    moments.update(h, partial, total)
    assert moments.inputs_II is not None and moments.cross_LIH is not None
    predictor = fit_predictor(moments.inputs_II, moments.cross_LIH, moments.weight, 8)
    ready = predictor.to(torch.device("cpu"))
    codes = ready.codes(h)
    rest = torch.stack([part.float() - ready.of_rank(codes, rank) for rank, part in enumerate(partial)])
    rms = [values.float().square().mean(dim=-2).sqrt() for values in (partial, total, rest, rest.sum(dim=0))]
    ratio = total.square().mean().sqrt() / partial.float().square().mean(dim=(1, 2)).sqrt()
    mean_RH = moments.cross_LIH[:, -1] / moments.weight
    of_partials, of_sum = StepObserver(), StepObserver()
    weight_T = 1 / total.square().mean(dim=1)
    of_partials.update(partial, weight_T)
    of_sum.update(total[None], weight_T)
    points = SyncPointMoments(*rms, ratio, predictor, mean_RH, of_partials.steps(), of_sum.steps()[:, 0])
    ranges = partial.float().amin(dim=1), partial.float().amax(dim=1), total.amin(dim=0), total.amax(dim=0)
    return SyncPointStatistics(*ranges, points)


def chains(context: ParallelContext, drawn: list[list[Any]]) -> dict[str, Any]:
    """Digests of the residual behind each point, of chains drawn by (seed, tokens, hidden, normed)."""
    rows = []
    for seed, tokens, hidden, normed in drawn:
        chain = draw_chain(seed, context.size, tokens, hidden, normed)
        context.traffic.reset()
        behind = [digest(residual) for residual in chain.run(context)]
        rows.append({"digests": behind, "traffic": dict(context.traffic.sent_nbytes)})
    return {"rows": rows}
