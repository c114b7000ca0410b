"""evaluate against KL divergence and perplexity computed plainly, with whole softmaxes in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.model_cases import logits_of, prompt_of

from megatron_lowbit.calibration_run import calibrate
from megatron_lowbit.comm.saturation import SaturationLog
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.evaluation import DecodePath, EvaluationRow, evaluate
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.weights import ModelWeights, load_weights

RANKS, LENGTH = 3, 40  # more rows than are scored at once
WINDOWS = [prompt_of(131, LENGTH, start) for start in range(5)]


@pytest.fixture(scope="module")
def weights(tiny_models) -> ModelWeights:
    return load_weights(tiny_models("odd"), ParallelContext.virtual_ranks(RANKS), torch.float32)


@pytest.fixture(scope="module")
def calibration(weights):
    return calibrate(weights, WINDOWS, "0" * 64)


def plain(weights, scheme: str, calibration=None) -> dict[str, float]:
    """The numbers of one scheme, window by window, nothing shared with `evaluate` but the models' logits."""
    nll, kl_of_windows, agreed, scored = 0.0, [], 0, 0
    for window in WINDOWS:
        exact = logits_of(weights, window).double().log_softmax(dim=-1)[:-1]
        found = logits_of(weights, window, scheme, calibration).double().log_softmax(dim=-1)[:-1]
        for position, target in enumerate(window[1:]):
            nll -= float(found[position, target])
        kl = sum(
            float(p.exp() * (p - q))
            for row_p, row_q in zip(exact, found, strict=True)
            for p, q in zip(row_p, row_q, strict=True)
        )
        kl_of_windows.append(kl / (LENGTH - 1))
        agreed += int((exact.argmax(dim=-1) == found.argmax(dim=-1)).sum())
        scored += LENGTH - 1
    mean = sum(kl_of_windows) / len(WINDOWS)
    spread = math.sqrt(sum((kl - mean) ** 2 for kl in kl_of_windows) / (len(WINDOWS) - 1))
    return {
        "perplexity": math.exp(nll / scored),
        "kl_mean": mean,
        "kl_stderr": spread / math.sqrt(len(WINDOWS)),
        "top1_agreement": agreed / scored,
        "tokens": scored,
    }


def test_exact_differs_from_itself_in_nothing(weights):
    (row,) = evaluate(weights, ["exact"], WINDOWS)
    assert (row.kl_mean, row.kl_stderr, row.perplexity_ratio, row.top1_agreement) == (0.0, 0.0, 1.0, 1.0)
    assert (row.scheme, row.stages, row.reduce_bits_per_value, row.gather_bits_per_value) == ("exact", 2, 32.0, 32.0)
    assert row.tokens == 5 * (LENGTH - 1)
    assert row.perplexity == pytest.approx(plain(weights, "exact")["perplexity"], rel=1e-6)
    assert row.saturated_share == 0 and row.non_finite == 0


@pytest.mark.parametrize("scheme", ["int4-outlier", "int4-group", "int4-random:seed=1:one-stage"])
def test_rows_equal_the_plain_computation(weights, calibration, scheme):
    (row,) = evaluate(weights, [scheme], WINDOWS, calibration)
    expected = plain(weights, scheme, calibration)
    # FP32 log-probabilities of size 10 err by 2^-21 each; a KL of 0.1 and more is good to about 1e-5 of itself
    assert row.perplexity == pytest.approx(expected["perplexity"], rel=1e-5)
    assert row.kl_mean == pytest.approx(expected["kl_mean"], rel=1e-4) and row.kl_mean > 0.01
    assert row.kl_stderr == pytest.approx(expected["kl_stderr"], rel=1e-3)
    assert row.top1_agreement == expected["top1_agreement"] < 1
    assert row.tokens == expected["tokens"]
    exact = plain(weights, "exact")["perplexity"]
    assert row.perplexity_ratio == pytest.approx(expected["perplexity"] / exact, rel=1e-5)


def test_exact_equals_transformers(weights, tiny_models):
    """Perplexity from transformers' own loss, so that a shift of targets by one would show."""
    losses = []
    for window in WINDOWS:
        tokens = torch.tensor([window])
        with torch.no_grad():
            losses.append(float(tiny_models.hf("odd")(tokens, labels=tokens).loss))
    (row,) = evaluate(weights, ["exact"], WINDOWS)
    assert row.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


@pytest.mark.parametrize("scheme", ["int4-outlier", "int8-group", "bf16:one-stage", "exact"])
def test_traffic_and_bits_are_the_schemes(weights, calibration, scheme):
    (row,) = evaluate(weights, [scheme], WINDOWS, calibration)
    named = parse_scheme(scheme)
    assert row.reduce_bits_per_value == named.reduce_stage.wire_bits_per_value(81)
    if named.gather_stage is None:
        assert row.gather_bits_per_value is None and row.stages == 1
    else:
        assert row.gather_bits_per_value == named.gather_stage.wire_bits_per_value(81)
    # 2 layers with 2 sync points
    assert row.sent_nbytes_per_token_per_rank == pytest.approx(4 * named.sent_nbytes_per_token(81, RANKS), rel=1e-12)


def test_exact_of_a_bf16_model_sends_its_partials_in_bf16(tiny_models):
    weights = load_weights(tiny_models("odd"), ParallelContext.virtual_ranks(RANKS), torch.bfloat16)
    (row,) = evaluate(weights, ["exact"], WINDOWS[:1])
    assert row.scheme == "exact"
    assert (row.reduce_bits_per_value, row.gather_bits_per_value) == (16.0, 32.0)
    assert row.sent_nbytes_per_token_per_rank == pytest.approx(4 * 2 / 3 * 81 * (2 + 4))


def test_rows_come_in_the_order_asked_for_and_do_not_depend_on_it(weights, calibration):
    names = ["int4-group", "exact", "int4-outlier"]
    rows = evaluate(weights, names, WINDOWS, calibration)
    assert [row.scheme for row in rows] == names
    alone = [evaluate(weights, [name], WINDOWS, calibration)[0] for name in names]
    assert [numbers(row) for row in rows] == [numbers(row) for row in alone]


def test_a_scheme_named_twice_gives_two_equal_rows(weights, calibration):
    """Not one with both runs' bytes."""
    first, second = evaluate(weights, ["int4", "int4"], WINDOWS[:2], calibration)
    (alone,) = evaluate(weights, ["int4"], WINDOWS[:2], calibration)
    assert numbers(first) == numbers(second) == numbers(alone)


def numbers(row: EvaluationRow) -> dict:
    """All of a row but its speed."""
    return {key: value for key, value in vars(row).items() if not key.endswith("tokens_per_s")}


def test_progress_counts_forward_passes(weights):
    seen: list[tuple[int, int]] = []
    evaluate(weights, ["bf16", "int8-group"], WINDOWS[:2], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]  # exact is run too
    seen.clear()
    decode = DecodePath(2, 5)
    evaluate(weights, ["bf16"], WINDOWS[:4], progress=lambda done, total: seen.append((done, total)), decode=decode)
    assert seen == [(done, 20) for done in range(1, 21)]  # 2 batches of 5 steps


def test_saturated_values_are_counted_by_hand(weights, calibration):
    """Values clamped in the reduce stage of every rank and in the gather stage, of the windows and no warm-up."""
    (row,) = evaluate(weights, ["int4-outlier"], WINDOWS, calibration)
    log: SaturationLog = {}
    model = weights.build_with_scheme(parse_scheme("int4-outlier"), calibration, "auto", log)
    for window in WINDOWS:
        model(TokenBatch.prompts([window], torch.device("cpu")))
    values = sum(counter.values for counter in log.values())
    # 4 sync points, 5 windows of 40 tokens and 81 features, from 3 ranks and once more from the owners
    assert values == 4 * 5 * 40 * 81 * (RANKS + 1)
    saturated = sum(counter.saturated for counter in log.values())
    assert 0 < saturated < values / 10
    assert row.saturated_share == saturated / values
    assert row.non_finite == 0


def test_values_that_are_not_finite_are_counted(weights):
    tensors = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    tensors["layers.1.mlp.down_proj.weight"][7] = torch.inf
    damaged = ModelWeights(weights.config, weights.context, weights.dtype, weights.fingerprint, tensors)
    (row,) = evaluate(damaged, ["int8-group"], WINDOWS[:1])
    # feature 7 of the last sync point: of 3 ranks, and of the sum, where the whole row's one group of 81 is NaN
    assert row.non_finite == LENGTH * (3 + 81)


@pytest.mark.parametrize("scheme", ["int9", "int4:fast"])
def test_unknown_schemes_are_refused_before_any_work(weights, scheme):
    with pytest.raises(ValueError, match="unknown"):
        evaluate(weights, [scheme], WINDOWS)


def test_missing_and_foreign_calibrations_are_refused(weights, calibration, tiny_models):
    with pytest.raises(ValueError, match="needs a calibration file"):
        evaluate(weights, ["bf16", "int4"], WINDOWS)
    other = load_weights(tiny_models("odd"), ParallelContext.virtual_ranks(2), torch.float32)
    with pytest.raises(ValueError, match="made for 3 tensor-parallel ranks, this run has 2"):
        evaluate(other, ["int4"], WINDOWS, calibration)
    foreign = load_weights(tiny_models("biased"), ParallelContext.virtual_ranks(3), torch.float32)
    with pytest.raises(ValueError, match="belongs to another model"):
        evaluate(foreign, ["int4"], [[1, 2]], calibration)


def test_decoding_predicts_what_prefill_does(weights, calibration):
    """Results depend on neither the path nor the batch: the same positions, token by token, within rounding."""
    first, scored = LENGTH - 7, 6
    seen: dict[str, dict[tuple[int, int], tuple[float, float, bool]]] = {}

    def remember(scheme, scores):
        rows = zip(scores.windows_N.tolist(), scores.positions_N.tolist(), strict=True)
        for where, *values in zip(rows, scores.kl_N.tolist(), scores.nll_N.tolist(), scores.agreed_N, strict=True):
            seen.setdefault(scheme, {})[where] = tuple(values)

    evaluate(weights, ["int4-outlier"], WINDOWS[:4], calibration, observer=remember)
    whole = {scheme: {w: v for w, v in found.items() if w[1] >= first} for scheme, found in seen.items()}
    assert len(whole["int4-outlier"]) == 4 * scored == len(whole["exact"])
    for batch in (1, 4):
        seen.clear()
        (row,) = evaluate(
            weights, ["int4-outlier"], WINDOWS[:4], calibration, decode=DecodePath(batch, scored), observer=remember
        )
        for scheme, expected in whole.items():
            assert seen[scheme].keys() == expected.keys()
            for where, (kl, nll, _) in seen[scheme].items():
                # FP32 products of other shapes; now and then a value falls on the other side of a code's border
                assert kl == pytest.approx(expected[where][0], rel=0.05, abs=1e-6), (scheme, where)
                assert nll == pytest.approx(expected[where][1], rel=0.02, abs=1e-3), (scheme, where)
        kls = [kl for kl, _, _ in whole["int4-outlier"].values()]
        assert row.kl_mean == pytest.approx(sum(kls) / len(kls), rel=0.02) and row.kl_mean > 0.01
        assert (row.path, row.batch, row.tokens, row.prefill_tokens_per_s) == ("decode", batch, 4 * scored, None)
        assert row.decode_tokens_per_s > 0
        # of the decoded tokens alone
        assert row.sent_nbytes_per_token_per_rank == pytest.approx(
            4 * parse_scheme("int4-outlier").sent_nbytes_per_token(81, RANKS)
        )


@pytest.mark.parametrize("path, says", [(DecodePath(3, 4), "batches of 3"), (DecodePath(1, 39), "1 to 38")])
def test_windows_that_do_not_fit_the_decode_path_are_refused(weights, path, says):
    with pytest.raises(ValueError, match=says):
        evaluate(weights, ["bf16"], WINDOWS[:4], decode=path)
