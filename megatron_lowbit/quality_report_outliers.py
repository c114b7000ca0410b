"""Which features have wide ranges, layer by layer, and how far ranks, layers and tokens agree on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, pairwise

import torch

from megatron_lowbit.calibration.artifact import CommCalibration, SyncPointStatistics
from megatron_lowbit.calibration.outliers import aggregated_range, select_outliers
from megatron_lowbit.comm.all_reduce import AllReduce, build_all_reduce
from megatron_lowbit.comm.compensation import CompensatedAllReduce
from megatron_lowbit.comm.constants import NO_CONSTANTS
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.comm.sync_point import Norm, join_sum
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.weights import ModelWeights

# Shapes: L ranks living in this process, R ranks, T tokens, H hidden features, C columns of the map, K outliers.

#: Sets hold one feature in so many, as the paper's do.
DIVISOR = 64
#: Columns of the map at most; wider models show the widest of neighbouring features.
MOST_COLUMNS = 320

#: What is compared with what, by the key of its row.
OVERLAPS = {
    "two_ranks": "the sets of two ranks at one sync point (mean over all pairs of ranks)",
    "rank_and_all": "the set of one rank, and the set of the ranges summed over ranks, which the paper sends in BF16",
    "partials_and_sum": "the set of the summed ranges, and the set of the ranges of the sum itself",
    "neighbours": "the sets of a sync point and of the next one that the residual passes",
    "same_kind": "the sets of a sync point and of the next one of its kind (o_proj or down_proj)",
    "any_two": "the sets of any two sync points",
    "range_and_rms": "the set by range, and the set by root mean square",
    "token_and_set": "the features that are largest in one token of one rank, and the calibrated set",
    "token_energy": "share of a median token's energy that lies in the calibrated set",
    "token_energy_best": "the same, had every token chosen its own features",
}


def outlier_rows(calibration: CommCalibration, names: Iterable[str]) -> list[dict[str, object]]:
    """The map, one row a sync point: `log10_ranges` of the ranges summed over ranks, rounded, with the number of
    features that share a column, and the calibrated `outliers`."""
    rows: list[dict[str, object]] = []
    width = -(-calibration.hidden // MOST_COLUMNS)
    for name in names:
        range_H = aggregated_range(calibration.sync_points[name])
        columns = torch.stack([part.amax() for part in range_H.split(width)])
        _, layer, _, kind = name.split(".")
        logs = columns.clamp_min(1e-12).log10()
        rows.append(
            {
                "part": "outliers",
                "sync_point": name,
                "layer": int(layer),
                "kind": kind,
                "features_per_column": width,
                "log10_ranges": [round(value, 2) for value in logs.tolist()],
                "outliers": select_outliers(range_H, set_size(calibration.hidden)).tolist(),
            }
        )
    return rows


def set_size(hidden: int) -> int:
    """K, at least one feature."""
    return max(1, hidden // DIVISOR)


def overlap_rows(
    weights: ModelWeights,
    calibration: CommCalibration,
    windows: Sequence[Sequence[int]],
    progress: Callable[[], None],
    backend: str = "auto",
) -> list[dict[str, object]]:
    """One row for each of OVERLAPS that can be had, `value` a mean over sync points; the same on all ranks.

    `chance`: the value for random sets (of energy: for features that are all alike). Tokens come from `windows`.
    """
    names = weights.config.sync_points
    points = [calibration.sync_points[name] for name in names]
    values = set_overlaps(points, set_size(calibration.hidden))
    values |= _of_tokens(weights, calibration, windows, progress, backend)
    chance = set_size(calibration.hidden) / calibration.hidden
    return [
        {"part": "overlap", "what": key, "value": values[key], "chance": None if key == "token_energy_best" else chance}
        for key in OVERLAPS
        if key in values
    ]


def set_overlaps(points: Sequence[SyncPointStatistics], count: int) -> dict[str, float]:
    """Of sets of `count` features at sync points in their order (of layers: o_proj, down_proj), by key of OVERLAPS."""

    def top(values_H: torch.Tensor) -> frozenset[int]:
        return frozenset(select_outliers(values_H, count).tolist())

    def shared(pairs: Iterable[tuple[frozenset[int], frozenset[int]]]) -> list[float]:
        return [len(one & other) / count for one, other in pairs]

    whole = [top(aggregated_range(point)) for point in points]
    ranks = [[top(r) for r in torch.maximum(-point.partial_min, point.partial_max)] for point in points]
    sums = [top(torch.maximum(-point.sum_min, point.sum_max)) for point in points]
    found = {
        "two_ranks": shared(pair for sets in ranks for pair in combinations(sets, 2)),
        "rank_and_all": shared((one, all_) for sets, all_ in zip(ranks, whole, strict=True) for one in sets),
        "partials_and_sum": shared(zip(whole, sums, strict=True)),
        "neighbours": shared(pairwise(whole)),
        "same_kind": shared(zip(whole, whole[2:], strict=False)),
        "any_two": shared(combinations(whole, 2)),
        "range_and_rms": shared(
            (one, top(point.moments.partial_rms.square().sum(dim=0)))
            for one, point in zip(whole, points, strict=True)
            if point.moments is not None
        ),
    }
    return {key: sum(values) / len(values) for key, values in found.items() if values}


class _TokenObserver:
    """Passes the exact sum on, and looks where each token's large values lie."""

    def __init__(self, exact: AllReduce, outliers_K: torch.Tensor) -> None:
        self._exact, self._outliers_K = exact, outliers_K
        self.in_set: list[torch.Tensor] = []
        self.energy: list[torch.Tensor] = []
        self.best_energy: list[torch.Tensor] = []

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
        square_LTH = partial_LTH.float().square()
        # a rank without a head sends zeros, which have no largest features
        square_NH = square_LTH.flatten(0, 1)
        square_NH = square_NH[square_NH.sum(dim=1) > 0]
        total_N = square_NH.sum(dim=1)
        values_NK, index_NK = square_NH.topk(len(self._outliers_K), dim=1)
        self.in_set.append(torch.isin(index_NK, self._outliers_K).float().mean(dim=1))
        self.energy.append(square_NH[:, self._outliers_K].sum(dim=1) / total_N)
        self.best_energy.append(values_NK.sum(dim=1) / total_N)
        return join_sum(self._exact(partial_LTH), residual_TH, bias, post_norm)

    def values(self) -> list[float]:
        """Mean share of largest features in the set; median energies."""
        energies = [float(torch.cat(found).median()) for found in (self.energy, self.best_energy)]
        return [float(torch.cat(self.in_set).mean()), *energies]


def _of_tokens(
    weights: ModelWeights,
    calibration: CommCalibration,
    windows: Sequence[Sequence[int]],
    progress: Callable[[], None],
    backend: str,
) -> dict[str, float]:
    context, hidden = weights.context, weights.config.hidden_size
    exact = build_all_reduce(context, parse_scheme("exact").for_dtype(weights.dtype), hidden, NO_CONSTANTS, backend)
    assert not isinstance(exact, CompensatedAllReduce)
    observers: dict[str, _TokenObserver] = {}

    def observer(name: str) -> _TokenObserver:
        range_H = aggregated_range(calibration.sync_points[name])
        outliers_K = select_outliers(range_H, set_size(hidden)).to(context.device)
        observers[name] = _TokenObserver(exact, outliers_K)
        return observers[name]

    model = weights.build(observer)
    for window in windows:
        model(TokenBatch.prompts([window], context.device))
        progress()
    # a rank's own values where it saw any; a mean over ranks and sync points
    seen = [each.values() for each in observers.values() if sum(map(len, each.in_set))]
    rows = [row for rows in context.all_gather_json(seen) for row in rows]
    keys = ("token_and_set", "token_energy", "token_energy_best")
    return {key: sum(column) / len(column) for key, column in zip(keys, zip(*rows, strict=True), strict=True)}
