"""Tuning a scheme: the choice against every other one, errors against the wire, sensitivities, and the whole search."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers.model_cases import prompt_of

from megatron_lowbit.calibration_run import calibrate
from megatron_lowbit.comm.presets import FINE_LAST, PRESETS
from megatron_lowbit.comm.schemes import CommScheme, parse_scheme
from megatron_lowbit.evaluation import evaluate
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.scheme_tuning import Goal, tune_scheme
from megatron_lowbit.scheme_tuning_errors import format_errors
from megatron_lowbit.scheme_tuning_search import best_uniform, candidates, choose
from megatron_lowbit.scheme_tuning_sensitivity import COARSE, FINE, SMALLEST_SHARE, sensitivities
from megatron_lowbit.weights import ModelWeights, load_weights

RANKS = 2
WINDOWS = [prompt_of(131, 24, start) for start in range(8)]


@contextmanager
def silently(what):
    yield lambda done, total: None


@pytest.fixture(scope="module")
def weights(tiny_models) -> ModelWeights:
    return load_weights(tiny_models("odd"), ParallelContext.virtual_ranks(RANKS), torch.float32)


@pytest.fixture(scope="module")
def calibration(weights):
    return calibrate(weights, WINDOWS, "0" * 64)


def random_damages(seed: int, sites: int, formats: int) -> tuple[dict, list[float]]:
    """Sites of very different weights; some formats are worse than cheaper ones."""
    generator = torch.Generator().manual_seed(seed)
    bits = sorted((2 + 6 * torch.rand(formats, generator=generator)).tolist())
    scale = (10 ** (3 * torch.rand(sites, generator=generator))).tolist()
    luck = torch.rand(sites, formats, generator=generator).add(0.5).tolist()
    damages = {
        (f"p{site // 2}", site % 2): [scale[site] * 4**-b * luck[site][at] for at, b in enumerate(bits)]
        for site in range(sites)
    }
    return damages, bits


@pytest.mark.parametrize("seed", range(12))
def test_nothing_that_costs_as_little_is_better(seed):
    """Against all combinations: what greedy upgrades leave on the table is less than the last one that did not fit."""
    damages, bits = random_damages(seed, sites=4, formats=6)
    budget = 4.5
    chosen = choose(damages, bits, budget)
    assert chosen.mean_bits <= budget
    assert chosen.mean_bits == pytest.approx(sum(bits[index] for index in chosen.formats.values()) / len(damages))
    assert chosen.damage == pytest.approx(sum(damages[site][index] for site, index in chosen.formats.items()))
    same_cost = []
    for indices in itertools.product(range(len(bits)), repeat=len(damages)):
        cost = sum(bits[index] for index in indices) / len(damages)
        damage = sum(of[index] for of, index in zip(damages.values(), indices, strict=True))
        same_cost += [damage] if cost <= chosen.mean_bits + 1e-12 else []
    # upgrades on the hull are optimal for exactly the bits they use, unless one was skipped for another
    assert chosen.damage <= 1.3 * min(same_cost)
    assert chosen.damage < best_uniform(damages, bits, budget).damage


@pytest.mark.parametrize("seed", range(6))
def test_the_cheapest_below_a_damage(seed):
    damages, bits = random_damages(seed, sites=40, formats=12)
    limit = best_uniform(damages, bits, 5.0).damage
    cheapest = choose(damages, bits, damage=limit)
    assert cheapest.damage <= limit and cheapest.mean_bits < best_uniform(damages, bits, damage=limit).mean_bits
    # asked the other way round, those bits buy no more
    assert choose(damages, bits, cheapest.mean_bits).damage == pytest.approx(cheapest.damage)


def test_bits_go_where_errors_cost_most():
    bits = [2.0, 3.0, 4.0, 5.0, 6.0]
    damages = {("cheap", 0): [4**-b for b in bits], ("dear", 0): [64 * 4**-b for b in bits]}
    chosen = choose(damages, bits, 4.0)
    # KL is least where another bit would gain the same: a factor of 64 is 3 bits, all of which the cheap one gives
    assert (bits[chosen.formats["dear", 0]], bits[chosen.formats["cheap", 0]]) in ((5.0, 3.0), (6.0, 2.0))
    assert chosen.mean_bits == 4.0


def test_goals_out_of_reach():
    damages, bits = random_damages(0, 4, 6)
    with pytest.raises(ValueError, match=f"below the {min(bits):.2f}"):
        choose(damages, bits, 1.9)
    with pytest.raises(ValueError, match="finest formats"):
        choose(damages, bits, damage=1e-9)
    for goal in ({"budget_bits": 1.9}, {"damage": 1e-9}):
        with pytest.raises(ValueError, match="the same everywhere"):
            best_uniform(damages, bits, **goal)
    for wrong in ({}, {"budget_bits": 4.0, "max_kl": 0.1}, {"max_kl": 0.0}, {"budget_bits": float("nan")}):
        with pytest.raises(ValueError, match="one goal"):
            Goal(**wrong)


def test_candidates_cost_what_they_say():
    for hidden, fast in ((64, False), (576, True), (4096, False)):
        for each in candidates(hidden, fast):
            assert each.bits == parse_scheme(each.name).reduce_stage.wire_bits_per_value(hidden)
    # presets are among what a search may choose, so that it can do no worse
    for name, text in PRESETS.items():
        fast = name.startswith("balanced")
        assert parse_scheme(text).reduce_stage in {each.wire for each in candidates(576, fast)}
    assert len(candidates(576)) == len(candidates(576, True)) == 168
    assert not any(each.wire.values == "tc" for each in candidates(576, True))
    assert candidates(31) and not any("outlier" in each.name for each in candidates(31))


def test_errors_are_those_of_the_wire(weights, calibration):
    """One sync point sent in a format, the others exactly: the residual moves by as much as was measured there."""
    names = (
        "tc4-g32-e4m3-prescaled0.6",
        "int8-g128-e4m3-prescaled0.6-outlier32",
        "tc3-g64-e4m3-prescaled0.6-rotated-outlier64",
    )
    formats = [each for each in candidates(81) if each.name in names]
    assert len(formats) == 3
    sequence = WINDOWS[0]
    errors = format_errors(weights, calibration, formats, True, [sequence])
    assert list(errors) == [(name, stage) for name in calibration.sync_points for stage in (0, 1)]
    first = next(iter(calibration.sync_points))
    for index, each in enumerate(formats):
        wire = parse_scheme(each.name).reduce_stage
        choice = parse_scheme(each.name).outlier_choice
        exact = parse_scheme("exact").reduce_stage
        for stage, pair in enumerate(((wire, exact), (exact, wire))):
            moved = residual_error(weights, calibration, CommScheme("any", *pair, choice), first, sequence)
            # errors of ranks are independent, so the sum's is theirs summed, but for chance over 24 x 81 values
            assert errors[first, stage][index] == pytest.approx(moved, rel=0.15 if stage == 0 else 1e-3)


def residual_error(weights, calibration, scheme, name, sequence) -> float:
    """Relative squared error of the residual behind the sync point `name`."""
    from megatron_lowbit.calibration.outliers import constants_from_statistics
    from megatron_lowbit.comm.all_reduce import build_all_reduce
    from megatron_lowbit.comm.constants import NO_CONSTANTS
    from megatron_lowbit.layers.kv_cache import TokenBatch

    context, hidden = weights.context, weights.config.hidden_size
    constants = constants_from_statistics(scheme, name, calibration.sync_points[name])
    exact = build_all_reduce(context, parse_scheme("exact"), hidden, NO_CONSTANTS)
    low = build_all_reduce(context, scheme, hidden, constants)
    seen = []

    class Both:
        def join(self, partial_LTH, residual_TH, bias, block_input_TH, state, post_norm):
            before = residual_TH.clone()
            after = exact(partial_LTH, residual_TH)
            seen.append((low(partial_LTH, before) - after).square().mean(dim=1) / after.square().mean(dim=1))
            return after

    model = weights.build(lambda each: Both() if each == name else exact)
    model(TokenBatch.prompts([sequence], context.device))
    return float(seen[0].mean())


def test_predicted_parts_do_not_count(weights):
    """What is foretold need not travel: errors are smaller wherever the calibration has kept a predictor."""
    calibration = calibrate(weights, [prompt_of(131, 90, start) for start in range(0, 64, 2)], "0" * 64)
    formats = [each for each in candidates(81) if each.name == "tc4-g32-e4m3-prescaled0.6"]
    alone = format_errors(weights, calibration, formats, True, WINDOWS[:2])
    foretold = format_errors(weights, calibration, formats, False, WINDOWS[:2])
    helped = [site for site in alone if calibration.sync_points[site[0]].moments.predictor is not None]
    assert helped and all(foretold[site][0] < alone[site][0] for site in helped)
    assert all(foretold[site] == alone[site] for site in alone if site not in helped)


def test_sensitivities_say_what_coarse_points_cost(weights, calibration):
    formats = candidates(81)
    errors = format_errors(weights, calibration, formats, True, WINDOWS[:2])
    seen = []
    found = sensitivities(
        weights, calibration, "", formats, errors, WINDOWS[:4], progress=lambda *done: seen.append(done)
    )
    assert set(found.of_points) == set(calibration.sync_points) and found.floor > 0
    assert seen[-1] == (24, 24)
    # by hand for one point, through `evaluate`
    name = next(iter(calibration.sync_points))
    fine, coarse = parse_scheme(FINE), parse_scheme(COARSE[0])
    from megatron_lowbit.comm.schemes import PointFormats

    one = replace(fine, name="one", points=(PointFormats(name, coarse.reduce_stage, coarse.reduce_stage),))
    floor, added = (row.kl_mean for row in evaluate(weights, [fine, one], WINDOWS[:4], calibration))
    at = {each.name: index for index, each in enumerate(formats)}
    more = sum(errors[name, s][at[coarse.name]] - errors[name, s][at[fine.name]] for s in (0, 1))
    assert found.floor == pytest.approx(floor, rel=1e-6)
    mean = sum(found.of_points.values()) / len(found.of_points)
    assert found.of_points[name] == pytest.approx(max((added - floor) / more, SMALLEST_SHARE * mean), rel=1e-5)
    damages = found.damages(errors)
    assert damages[name, 1][3] == found.of_points[name] * errors[name, 1][3]


@pytest.mark.parametrize("portable", [True, False])
def test_a_budget_is_kept_and_spent(weights, calibration, portable):
    tuned = tune_scheme(
        weights, calibration, WINDOWS[:3], WINDOWS[4:], Goal(budget_bits=5.0), silently, portable, name="t", text="x"
    )
    origin = tuned.scheme.origin
    assert 4.7 < origin.wire_bits <= 5.0 and tuned.scheme.scheme.portable == portable
    uniform, *others = tuned.rows
    assert [row.scheme for row in others] == ["t", "finer last point"]
    assert origin.kl == min(row.kl_mean for row in tuned.rows) and origin.uniform_kl == uniform.kl_mean
    assert tuned.is_uniform == (origin.kl == uniform.kl_mean) == (not tuned.scheme.formats)
    # the scheme is what was evaluated, and the rows say what it is
    (again,) = evaluate(weights, [tuned.scheme], WINDOWS[4:], calibration)
    assert again.kl_mean == origin.kl
    scheme = tuned.scheme.scheme
    assert {point.name for point in tuned.points} == set(calibration.sync_points)
    for point in tuned.points:
        at = scheme.at(point.name, weights.config.sync_points)
        assert at.reduce_stage == parse_scheme(point.reduce_format).reduce_stage
        assert at.gather_stage == parse_scheme(point.gather_format).reduce_stage
    assert sum(point.error_share for point in tuned.points) == pytest.approx(1.0)
    bits = [bit for point in tuned.points for bit in (point.reduce_bits, point.gather_bits)]
    assert sum(bits) / len(bits) == pytest.approx(origin.wire_bits)


def test_what_is_not_better_is_not_taken(weights, calibration, monkeypatch):
    """Wrong sensitivities spend all bits where they help least; the proof on unseen text must catch it."""
    from megatron_lowbit import scheme_tuning

    def wrong(*args, **kwargs):
        found = sensitivities(*args, **kwargs)
        least = min(found.of_points, key=found.of_points.__getitem__)
        return replace(found, of_points={name: 1e6 if name == least else 1e-6 for name in found.of_points})

    monkeypatch.setattr(scheme_tuning, "sensitivities", wrong)
    tuned = tune_scheme(weights, calibration, WINDOWS[:3], WINDOWS[4:], Goal(budget_bits=5.0), silently, True)
    assert tuned.is_uniform and not tuned.scheme.formats and tuned.scheme.origin.kl == tuned.rows[0].kl_mean
    assert tuned.rows[1].kl_mean >= tuned.rows[0].kl_mean


@pytest.mark.parametrize(("budget", "rows"), [(5.0, 3), (2.9, 2)])
def test_a_finer_last_point_is_tried_where_the_budget_has_room(weights, calibration, monkeypatch, budget, rows):
    from megatron_lowbit import scheme_tuning

    def favourite(*args, **kwargs):
        *others, last = evaluate(*args, **kwargs)
        return [*others, replace(last, kl_mean=0.0)]

    monkeypatch.setattr(scheme_tuning, "evaluate", favourite)
    tuned = tune_scheme(weights, calibration, WINDOWS[:3], WINDOWS[4:], Goal(budget_bits=budget), silently, True)
    assert len(tuned.rows) == rows
    bits = [(row.reduce_bits_per_value + row.gather_bits_per_value) / 2 for row in tuned.rows]
    assert max(bits) <= budget + 1e-9 and tuned.scheme.origin.wire_bits == pytest.approx(bits[-1])
    formats = {point.name: {point.reduce_format, point.gather_format} for point in tuned.points}
    last = formats.pop(weights.config.sync_points[-1])
    if rows == 3:
        assert last == {FINE_LAST} and len(set.union(*formats.values())) == 1


def test_a_kl_limit_is_kept_to(weights, calibration):
    limit = 0.02
    tuned = tune_scheme(weights, calibration, WINDOWS[:3], WINDOWS[4:], Goal(max_kl=limit), silently)
    assert tuned.scheme.origin.kl <= limit
    coarse = replace(parse_scheme("int2-g64-prescaled:predict:loop"), name="coarse")
    assert evaluate(weights, [coarse], WINDOWS[4:], calibration)[0].kl_mean > limit  # it was no empty wish
    with pytest.raises(ValueError, match="no scheme of 2 to 8 bits"):
        tune_scheme(weights, calibration, WINDOWS[:3], WINDOWS[4:], Goal(max_kl=1e-9), silently)


def test_a_hopeful_expectation_is_corrected(weights, calibration, monkeypatch):
    """Where points cost ten times what the search was told, its first scheme misses the limit: it must try again."""
    from megatron_lowbit import scheme_tuning

    def hopeful(*args, **kwargs):
        found = sensitivities(*args, **kwargs)
        return replace(found, of_points={name: each / 10 for name, each in found.of_points.items()})

    monkeypatch.setattr(scheme_tuning, "sensitivities", hopeful)
    tuned = tune_scheme(weights, calibration, WINDOWS[:3], WINDOWS[4:], Goal(max_kl=0.02), silently)
    assert tuned.scheme.origin.kl <= 0.02


def test_one_rank_has_nothing_to_tune(weights, calibration):
    alone = replace(weights, context=ParallelContext.single())
    with pytest.raises(ValueError, match="at least 2 tensor-parallel ranks"):
        tune_scheme(alone, calibration, WINDOWS, WINDOWS, Goal(4.0), silently)
