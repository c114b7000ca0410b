"""What a quality report measures inside a model, against the plain method on recorded partial sums."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers.model_cases import generate, prompt_of

from megatron_lowbit.calibration.artifact import SyncPointStatistics
from megatron_lowbit.calibration.outliers import sync_point_constants
from megatron_lowbit.calibration_run import calibrate
from megatron_lowbit.comm import reference
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.comm.sync_point import SyncPoint
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.quality_report import Report, ReportSettings
from megatron_lowbit.quality_report_generation import continuations
from megatron_lowbit.quality_report_layers import sync_point_errors
from megatron_lowbit.quality_report_outliers import OVERLAPS, outlier_rows, overlap_rows, set_overlaps
from megatron_lowbit.sampling import SamplingParams
from megatron_lowbit.weights import ModelWeights, load_weights

RANKS, LENGTH, HIDDEN = 3, 24, 81
WINDOWS = [prompt_of(131, LENGTH, start) for start in range(4)]


@pytest.fixture(scope="module")
def weights(tiny_models) -> ModelWeights:
    return load_weights(tiny_models("odd"), ParallelContext.virtual_ranks(RANKS), torch.float32)


@pytest.fixture(scope="module")
def calibration(weights):
    return calibrate(weights, WINDOWS, "0" * 64)


class Recorder:
    """Stands at a sync point and keeps the partial sums and what joined the residual."""

    def __init__(self, name, collective, seen):
        self.name, self.collective, self.seen = name, collective, seen

    def join(self, partial_LTH, residual_TH, bias, block_input_TH, state, post_norm):
        before = residual_TH.clone()
        point = SyncPoint(self.name, self.collective, post_norm)
        after = point.add(partial_LTH, residual_TH, bias, block_input_TH, state)
        self.seen[self.name] = partial_LTH.clone(), after - before, after.clone()
        return after


def share(error_TH, whole_TH) -> float:
    return float((error_TH.square().sum(dim=1) / whole_TH.square().sum(dim=1)).mean())


def record(weights, scheme, calibration, window) -> dict:
    seen: dict = {}
    model = weights.build_with_scheme(
        scheme, calibration, wrap=lambda name, collective: Recorder(name, collective, seen)
    )
    model(TokenBatch.prompts([window], torch.device("cpu")))
    return seen


@pytest.mark.parametrize(
    "name", ["int4-outlier", "int4-g64", "int4-g64-prescaled:predict:loop", "int4-g64-prescaled-rotated-outlier:loop"]
)
def test_errors_are_those_of_the_partials_that_came(weights, calibration, name):
    scheme = parse_scheme(name)
    rows = sync_point_errors(weights, scheme, calibration, WINDOWS[:2], lambda: None)
    passes = [record(weights, scheme, calibration, window) for window in WINDOWS[:2]]
    assert [row["sync_point"] for row in rows] == list(passes[0]) == weights.config.sync_points
    drifts = [torch.zeros(LENGTH, HIDDEN) for _ in passes]
    for row in rows:
        errors, after_drifts, reduced = [], [], []
        constants = sync_point_constants(scheme, row["sync_point"], HIDDEN, calibration, torch.device("cpu"))
        for seen, drift_TH in zip(passes, drifts, strict=True):  # every pass starts without drift
            partials_LTH, added_TH, after_TH = seen[row["sync_point"]]
            exact_TH = partials_LTH.sum(dim=0)
            drift_TH += added_TH - exact_TH
            errors.append(share(added_TH - exact_TH, exact_TH))
            after_drifts.append(share(drift_TH, after_TH))
            if scheme.portable:
                first_TH = reference.all_reduce(list(partials_LTH), parse_scheme(f"{name}:one-stage"), constants)
                reduced.append(share(first_TH - exact_TH, exact_TH))
        assert row["error"] == pytest.approx(sum(errors) / 2, rel=1e-3)
        assert row["drift"] == pytest.approx(sum(after_drifts) / 2, rel=1e-3)
        assert row["tokens"] == 2 * LENGTH and 1e-4 < row["drift"] < 1
        if scheme.portable:
            assert row["reduce_error"] == pytest.approx(sum(reduced) / 2, rel=1e-3)
            assert row["reduce_error"] < row["error"]
        else:
            assert row["reduce_error"] is None


def test_exact_has_no_error_and_the_loop_keeps_drift_small(weights, calibration):
    def drift(name):
        return sync_point_errors(weights, parse_scheme(name), calibration, WINDOWS[:2], lambda: None)

    assert all(row["error"] < 1e-12 and row["drift"] < 1e-12 for row in drift("exact"))
    open_, closed = (drift(f"int4-g64-prescaled{loop}")[-1]["drift"] for loop in ("", ":loop"))
    assert closed < open_


def test_saturation_is_told_by_stage(weights, calibration):
    scheme = parse_scheme("int4-outlier")
    rows = sync_point_errors(weights, scheme, calibration, WINDOWS[:1], lambda: None)
    seen = record(weights, scheme, calibration, WINDOWS[0])
    for row in rows:
        constants = sync_point_constants(scheme, row["sync_point"], HIDDEN, calibration, torch.device("cpu"))
        partials_LTH = seen[row["sync_point"]][0]
        beyond_LTD = partials_LTH[..., constants.body_index].abs() >= 7.5 * constants.reduce_scale_RD[:, None]
        assert row["saturated_reduce"] == int(beyond_LTD.sum()) / partials_LTH.numel()
        sum_TH = reference.all_reduce(list(partials_LTH), parse_scheme("int4-outlier:one-stage"), constants)
        beyond_TD = sum_TH[:, constants.body_index].abs() >= 7.5 * constants.gather_scale_1D
        assert row["saturated_gather"] == int(beyond_TD.sum()) / sum_TH.numel()
    assert any(row["saturated_reduce"] > 0 for row in rows) and any(row["saturated_gather"] > 0 for row in rows)
    (mixed, *_) = sync_point_errors(weights, parse_scheme("int4+int8-g64"), calibration, WINDOWS[:1], lambda: None)
    assert mixed["saturated_reduce"] is not None and mixed["saturated_gather"] is None
    for row in sync_point_errors(weights, parse_scheme("int4-g64-prescaled"), calibration, WINDOWS[:1], lambda: None):
        assert row["saturated_reduce"] is row["saturated_gather"] is None


def statistics(*ranks: list[float], sums: list[float]) -> SyncPointStatistics:
    """Ranges of each rank's features, minimums for every other one; and of the sum."""
    largest = torch.tensor(ranks)
    return SyncPointStatistics(-largest, largest / 2, -torch.tensor(sums) / 2, torch.tensor(sums))


def test_overlaps_of_sets_by_hand():
    points = [
        statistics([9, 8, 0, 1], [9, 0, 8, 1], sums=[9, 0, 1, 8]),  # ranks {0,1} {0,2}; sums of ranges 18, 8, 8, 2
        statistics([0, 9, 8, 1], [0, 9, 8, 1], sums=[0, 9, 8, 1]),  # {1,2} twice
        statistics([9, 0, 0, 8], [9, 0, 0, 8], sums=[9, 0, 0, 8]),  # {0,3} twice
    ]
    found = set_overlaps(points, 2)
    assert found == {
        "two_ranks": pytest.approx((0.5 + 1 + 1) / 3),
        "rank_and_all": pytest.approx((1 + 0.5 + 4) / 6),  # of equal sums of ranges the lower feature
        "partials_and_sum": pytest.approx((0.5 + 1 + 1) / 3),
        "neighbours": pytest.approx((0.5 + 0) / 2),
        "same_kind": 0.5,
        "any_two": pytest.approx((0.5 + 0.5 + 0) / 3),
    }


def test_tokens_outliers_against_plain_sorting(weights, calibration):
    rows = {row["what"]: row for row in overlap_rows(weights, calibration, WINDOWS[:1], lambda: None)}
    assert list(rows) == list(OVERLAPS)
    assert rows["any_two"]["chance"] == 1 / HIDDEN and rows["token_energy_best"]["chance"] is None
    seen = record(weights, parse_scheme("exact"), None, WINDOWS[0])
    sets = {row["sync_point"]: row["outliers"] for row in outlier_rows(calibration, seen)}
    hits, energies, best = [], [], []
    for name, (partials_LTH, _, _) in seen.items():
        (outlier,) = sets[name]
        magnitudes = partials_LTH.abs().flatten(0, 1)
        hits.append(sum(int(row.argmax()) == outlier for row in magnitudes) / len(magnitudes))
        squares = magnitudes.square()
        energies.append(sorted((squares[:, outlier] / squares.sum(dim=1)).tolist())[(len(squares) - 1) // 2])
        best.append(sorted((squares.amax(dim=1) / squares.sum(dim=1)).tolist())[(len(squares) - 1) // 2])
    for key, values in {"token_and_set": hits, "token_energy": energies, "token_energy_best": best}.items():
        assert rows[key]["value"] == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_the_map_shows_the_widest_feature_where_it_is(calibration):
    for row in outlier_rows(calibration, calibration.sync_points):
        assert row["features_per_column"] == 1 and len(row["log10_ranges"]) == HIDDEN
        assert row["log10_ranges"][row["outliers"][0]] == max(row["log10_ranges"])


def test_continuations_end_where_the_model_ends(weights, calibration):
    prompts = [window[:5] for window in WINDOWS]
    scheme = parse_scheme("int4-outlier")
    plain = generate(weights, prompts, SamplingParams(max_new_tokens=8), "int4-outlier", calibration)
    assert continuations(weights, scheme, calibration, prompts, 8, set(), lambda: None) == plain
    end = plain[0][3]
    cut = continuations(weights, scheme, calibration, prompts, 8, {end}, lambda: None)
    assert cut == [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in plain]
    assert len(cut[0]) <= 4


def report(weights, calibration, schemes, bars=None, **settings) -> Report:
    @contextmanager
    def bar(title):
        ticks: list[tuple[int, int]] = []
        if bars is not None:
            bars.append(ticks)
        yield lambda done, total: ticks.append((done, total))

    def windows(count, length):
        return [prompt_of(131, length, start) for start in range(count)]

    sizes = dict(windows=3, length=40, lengths=(20, 500), decode_batches=(1, 5), decode_prompt=10, decode_positions=10)
    more = dict(layer_windows=1, prompts=3, prompt_tokens=6, new_tokens=5)
    chosen = ReportSettings(**{**sizes, **more, **settings})
    return Report(weights, [parse_scheme(name) for name in schemes], calibration, windows, set(), chosen, bar)


def test_a_whole_report(weights, calibration):
    bars: list[list[tuple[int, int]]] = []
    rows = report(weights, calibration, ["bf16", "int4-outlier"], bars).rows()
    parts = {part: [row for row in rows if row["part"] == part] for part in dict.fromkeys(row["part"] for row in rows)}
    assert {part: len(found) for part, found in parts.items()} == {
        "verdict": 2, "quality": 2, "position": 2 * 2, "length": 2 * 2, "decode": 2 * 2, "layers": 2 * 4,
        "outliers": 4, "overlap": len(OVERLAPS), "generation": 2,
    }  # fmt: skip
    assert all(ticks[-1][0] == ticks[-1][1] == len(ticks) for ticks in bars), "bars reach their end"
    for row in parts["quality"]:
        pieces = [piece for piece in parts["position"] if piece["scheme"] == row["scheme"]]
        assert [(piece["first"], piece["last"]) for piece in pieces] == [(0, 15), (16, 38)]
        assert sum(piece["tokens"] for piece in pieces) == row["tokens"] == 3 * 39
        total = sum(piece["kl"] * piece["tokens"] for piece in pieces)
        assert total == pytest.approx(row["kl"] * row["tokens"])
        assert row["kl_low"] <= row["kl"] <= row["kl_high"]
        (whole,) = (piece for piece in parts["length"] if (piece["scheme"], piece["length"]) == (row["scheme"], 40))
        assert whole["kl"] == row["kl"]
    assert {row["length"] for row in parts["length"]} == {20, 40}, "the model has no room for 500"
    for row in parts["decode"]:
        assert (row["first"], row["last"]) == (10, 11)
        assert row["kl"] == pytest.approx(row["prefill_kl"], rel=0.1, abs=1e-6)  # FP32 products of other shapes
    bits = [row["mean_bits_per_value"] for row in parts["quality"]]
    assert bits[0] == 16.0 and bits[1] < 8


def test_parts_can_be_left_out(weights, calibration):
    rows = report(weights, None, ["bf16"], parts=frozenset({"generation", "outliers"})).rows()
    assert [row["part"] for row in rows] == ["generation"]  # no calibration, no map
    with pytest.raises(ValueError, match="speed; allowed: quality, lengths"):
        ReportSettings(parts=frozenset({"speed"}))


def test_one_rank_has_nothing_to_report(tiny_models):
    alone = load_weights(tiny_models("odd"), ParallelContext.single(), torch.float32)
    with pytest.raises(ValueError, match="--virtual-tp N"):
        report(alone, None, ["bf16"])
