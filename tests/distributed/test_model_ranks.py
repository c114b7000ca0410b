"""Whole models over real processes: transformers' logits and tokens, equal replicas, and failures seen by all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import model_cases
from helpers.model_cases import generate, logits_of, prompt_of

from checkpoints_conv.convert import convert
from megatron_lowbit.calibration.artifact import STATISTICS
from megatron_lowbit.calibration_run import calibrate
from megatron_lowbit.evaluation import evaluate
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sampling import SamplingParams
from megatron_lowbit.sharding import cut_evenly
from megatron_lowbit.weights import load_weights

# FP32 rounding of sums in another order, derived in tests/unit/test_models_virtual_tp.py.
TOLERANCE = 1e-4
# At 5 ranks "odd" has key-value heads on two ranks; "sparse" has ranks without heads, ffn features and tokens.
VARIANTS_AND_SIZES = [
    *(("odd", size) for size in (2, 3, 5)), *(("biased", size) for size in (2, 3)), ("sparse", 3), ("sparse", 5),
]  # fmt: skip


def hf_logits(tiny_models, variant, prompt):
    with torch.no_grad():
        return tiny_models.hf(variant)(torch.tensor([prompt])).logits[0]


def hf_generate(tiny_models, variant, prompt, count):
    """transformers' greedy tokens; the test means something only where no two tokens are nearly as good."""
    model = tiny_models.hf(variant)
    made = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), max_new_tokens=count,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    tokens = made[0, len(prompt) :].tolist()
    best = hf_logits(tiny_models, variant, prompt + tokens[:-1])[len(prompt) - 1 :].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 10 * TOLERANCE, "choose other prompts: rounding could pick either token"
    return tokens


@pytest.mark.parametrize(("variant", "size"), VARIANTS_AND_SIZES)
def test_logits_equal_transformers_and_replicas_are_identical(ranks, tiny_models, variant, size):
    vocabulary = tiny_models.hf(variant).config.vocab_size
    prompt = prompt_of(vocabulary, 50)
    schemes = ["exact", "exact:one-stage", "bf16", "int4-group"]
    results = ranks(size).run(
        model_cases.rank_logits, path=str(tiny_models(variant)), prompt=prompt, schemes=schemes
    )  # fmt: skip
    expected = hf_logits(tiny_models, variant, prompt)
    widths = [stop - start for start, stop in cut_evenly(vocabulary, size)]
    for scheme in schemes:
        first = results[0][f"{scheme}.hidden"]
        assert first.shape[0] == len(prompt) and first.isfinite().all()
        for rank, result in enumerate(results):
            assert torch.equal(result[f"{scheme}.hidden"], first), f"rank {rank} drifted away with {scheme}"
            assert result[f"{scheme}.logits"].shape == (len(prompt), widths[rank])
        logits = torch.cat([result[f"{scheme}.logits"] for result in results], dim=1)
        error = (logits - expected).abs()
        if scheme.startswith("exact"):
            assert error.max() < TOLERANCE, scheme
        else:  # the scheme is in use: it moves the logits, at 4 bits by a lot
            assert error.mean() > 1e-4, scheme


@pytest.mark.parametrize("size", [2, 5])
def test_low_bit_bf16_models_are_those_of_virtual_ranks(ranks, tiny_models, tmp_path, size):
    """As people run it: bf16 weights, calibrated INT4. Replicas are identical; virtual ranks come close, since another
    GEMM shape rounds some bf16 partial sum to its neighbour, and that moves some codes by one."""
    path, prompt = tiny_models("odd"), prompt_of(131, 40)
    weights = load_weights(path, ParallelContext.virtual_ranks(size), torch.bfloat16)
    calibration = calibrate(weights, [prompt_of(131, 30, start) for start in range(3)], "0" * 64)
    calibration.save(tmp_path / "calibration")
    schemes = ["int4-outlier", "int4-random:one-stage"]
    results = ranks(size).run(
        model_cases.rank_logits, path=str(path), prompt=prompt, schemes=schemes, dtype="bf16",
        calibration=str(tmp_path / "calibration"),
    )  # fmt: skip
    exact = logits_of(weights, prompt)
    for scheme in schemes:
        first = results[0][f"{scheme}.hidden"]
        assert first.dtype == torch.bfloat16 and first.isfinite().all()
        assert all(torch.equal(result[f"{scheme}.hidden"], first) for result in results), scheme
        real = torch.cat([result[f"{scheme}.logits"] for result in results], dim=1)
        virtual = logits_of(weights, prompt, scheme, calibration)
        caused_by_scheme, caused_by_rounding = (virtual - exact).abs().mean(), (virtual - real).abs().mean()
        assert caused_by_rounding < 0.3 * caused_by_scheme, scheme


@pytest.mark.parametrize(("variant", "size"), VARIANTS_AND_SIZES)
def test_greedy_generation_equals_transformers(ranks, tiny_models, variant, size):
    """Prompts of unequal length side by side: each continues as transformers continues it alone."""
    vocabulary = tiny_models.hf(variant).config.vocab_size
    prompts = [prompt_of(vocabulary, length, start) for length, start in ((5, 3), (14, 1), (1, 2))]
    results = ranks(size).run(
        model_cases.rank_generate, path=str(tiny_models(variant)), prompts=prompts, params={"max_new_tokens": 16}
    )
    expected = [hf_generate(tiny_models, variant, prompt, 16) for prompt in prompts]
    for result in results:
        assert result["tokens"] == expected


@pytest.mark.parametrize("scheme", ["bf16", "int8-group", "int4-group:one-stage"])
def test_batch_mates_do_not_change_a_prompt(ranks, tiny_models, scheme):
    """With low-bit sums too, since a token's packet depends on nothing but the token's own values."""
    path, sampled = str(tiny_models("odd")), {"max_new_tokens": 10}
    prompts = [prompt_of(131, length, start) for length, start in ((9, 3), (4, 1), (13, 2))]
    run = ranks(3).run
    together = run(model_cases.rank_generate, path=path, prompts=prompts, params=sampled, scheme=scheme)
    for number, prompt in enumerate(prompts):
        alone = run(model_cases.rank_generate, path=path, prompts=[prompt], params=sampled, scheme=scheme)
        for rank in range(3):
            assert together[rank]["tokens"][number] == alone[rank]["tokens"][0], f"prompt {number}, rank {rank}"


def test_sampling_is_the_same_on_all_ranks_and_at_any_size(ranks, tiny_models):
    path = tiny_models("odd")
    prompts = [prompt_of(131, 9), prompt_of(131, 4, start=1)]
    params = {"max_new_tokens": 12, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 5}
    weights = load_weights(path, ParallelContext.single(), torch.float32)
    expected = generate(weights, prompts, SamplingParams(**params))
    assert expected != generate(weights, prompts, SamplingParams(**{**params, "seed": 6}))
    for size in (2, 5):
        for result in ranks(size).run(model_cases.rank_generate, path=str(path), prompts=prompts, params=params):
            assert result["tokens"] == expected
    everything = {**params, "top_k": 0}
    expected = generate(weights, prompts, SamplingParams(**everything))
    for result in ranks(3).run(model_cases.rank_generate, path=str(path), prompts=prompts, params=everything):
        assert result["tokens"] == expected


@pytest.mark.parametrize(("variant", "size"), [("odd", 2), ("odd", 3), ("sparse", 5)])
def test_calibration_equals_that_of_virtual_ranks(ranks, tiny_models, variant, size):
    """To rounding only: the row-parallel products have the same shapes either way, but column-parallel ones are whole
    with virtual ranks and cut with real ones, and a GEMM of another shape may add in another order."""
    path = tiny_models(variant)
    vocabulary = tiny_models.hf(variant).config.vocab_size
    sequences = [prompt_of(vocabulary, 20, start) for start in range(4)]
    weights = load_weights(path, ParallelContext.virtual_ranks(size), torch.float32)
    expected = calibrate(weights, sequences, "0" * 64)
    results = ranks(size).run(model_cases.rank_calibrate, path=str(path), sequences=sequences)
    for rank, result in enumerate(results):
        assert (result["tp"], result["sequences"], result["fingerprint"]) == (size, 4, expected.fingerprint)
        for name, point in expected.sync_points.items():
            for statistic in STATISTICS:
                got, of_virtual = result[f"{name}.{statistic}"], getattr(point, statistic)
                # the same rounding as that of logits: values here are of the same size, one layer less deep
                torch.testing.assert_close(got, of_virtual, rtol=0, atol=TOLERANCE)
                assert torch.equal(got, results[0][f"{name}.{statistic}"]), f"{name}.{statistic} of rank {rank}"


def test_evaluation_equals_that_of_virtual_ranks(ranks, tiny_models, tmp_path):
    path, schemes = tiny_models("odd"), ["int4-outlier", "bf16", "int4-random:seed=2:one-stage"]
    weights = load_weights(path, ParallelContext.virtual_ranks(3), torch.float32)
    windows = [prompt_of(131, 24, start) for start in range(3)]
    calibration = calibrate(weights, windows, "0" * 64)
    calibration.save(tmp_path / "calibration.safetensors")
    expected = evaluate(weights, schemes, windows, calibration)
    results = ranks(3).run(
        model_cases.rank_evaluate, path=str(path), calibration=str(tmp_path / "calibration.safetensors"),
        schemes=schemes, windows=windows,
    )  # fmt: skip
    for result in results:
        assert result["rows"] == results[0]["rows"], "every rank reports the same row"
    for row, of_virtual in zip(results[0]["rows"], expected, strict=True):
        for field in ("scheme", "stages", "tokens", "reduce_bits_per_value", "gather_bits_per_value"):
            assert row[field] == getattr(of_virtual, field)
        assert row["sent_nbytes_per_token_per_rank"] == of_virtual.sent_nbytes_per_token_per_rank
        # Rounding of a partial can turn a code into its neighbour: one step in thousands of values, hence a percent.
        assert row["perplexity"] == pytest.approx(of_virtual.perplexity, rel=0.02)
        assert row["kl_mean"] == pytest.approx(of_virtual.kl_mean, rel=0.1, abs=1e-6)


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def converted(tiny_models, tmp_path) -> Path:
    convert(tiny_models("odd"), tmp_path / "tp3", 3, torch.float32)
    return tmp_path / "tp3"


def load_errors(ranks, *paths: Path) -> list[str]:
    results = ranks(3).run(model_cases.rank_load_errors, timeout_s=30, paths=[str(path) for path in paths])
    assert all(result["seconds"] < 10 for result in results), "an error took long to reach a rank"
    return [result["message"] for result in results]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 0xFF
    path.write_bytes(bytes(data))


def test_a_sound_checkpoint_loads(ranks, converted):
    assert load_errors(ranks, converted) == ["", "", ""]


def test_a_damaged_shard_of_one_rank_fails_on_all(ranks, converted):
    """Only rank 1 reads the damaged file; nobody may wait for it in the first collective."""
    damage(converted / "rank-01-of-03.safetensors")
    messages = load_errors(ranks, converted)
    assert len(set(messages)) == 1
    assert messages[0].startswith("rank 1: ") and "rank-01-of-03.safetensors" in messages[0], messages[0]


def test_a_truncated_copy_on_one_host_fails_on_all(ranks, converted, tmp_path):
    """Each rank has a copy of its own, as on several hosts; that of rank 2 is cut off."""
    copies = [tmp_path / f"host-{rank}" for rank in range(3)]
    for copy in copies:
        shutil.copytree(converted, copy)
    file = copies[2] / "rank-02-of-03.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    messages = load_errors(ranks, *copies)
    assert len(set(messages)) == 1
    assert messages[0].startswith("rank 2: ") and str(file) in messages[0], messages[0]


def test_a_missing_checkpoint_is_said_once(ranks, tmp_path):
    messages = load_errors(ranks, tmp_path / "nowhere")
    assert len(set(messages)) == 1 and not messages[0].startswith("rank"), messages[0]
    assert str(tmp_path / "nowhere") in messages[0]


def test_ranks_with_different_checkpoints_are_refused(ranks, tiny_models, converted, tmp_path):
    """Other weights, or the same ones in another dtype: the partial sums would not belong together."""
    messages = load_errors(ranks, converted, converted, tiny_models("biased"))
    assert len(set(messages)) == 1 and "differs between ranks" in messages[0], messages
    messages = load_errors(ranks, converted, tiny_models("odd"), converted)  # FP32 and, by default, BF16
    assert len(set(messages)) == 1 and "torch.bfloat16" in messages[0], messages


@pytest.fixture
def calibrations(tiny_models, tmp_path) -> dict[str, str]:
    """Files for 2 ranks, for 3, and for 3 from another text."""
    paths = {}
    for name, size, start in (("two", 2, 0), ("three", 3, 0), ("other", 3, 5)):
        weights = load_weights(tiny_models("odd"), ParallelContext.virtual_ranks(size), torch.float32)
        paths[name] = str(tmp_path / name)
        calibrate(weights, [prompt_of(131, 8, start)], "0" * 64).save(Path(paths[name]))
    return paths


def build_errors(ranks, tiny_models, calibrations: list[str], schemes: list[str]) -> list[str]:
    results = ranks(3).run(
        model_cases.rank_build_errors, path=str(tiny_models("odd")), calibrations=calibrations, schemes=schemes
    )
    return [result["message"] for result in results]


def test_calibration_of_another_size_is_refused_on_all_ranks(ranks, tiny_models, calibrations):
    assert build_errors(ranks, tiny_models, [calibrations["three"]], ["int4"]) == ["", "", ""]
    messages = build_errors(ranks, tiny_models, [calibrations["two"]], ["int4"])
    assert len(set(messages)) == 1 and not messages[0].startswith("rank"), messages
    assert "made for 2 tensor-parallel ranks, this run has 3" in messages[0]
    assert "--tp 3" in messages[0], "it must say how to make the right one"


def test_a_calibration_that_only_one_rank_lacks_is_refused_on_all(ranks, tiny_models, calibrations):
    three, two = calibrations["three"], calibrations["two"]
    messages = build_errors(ranks, tiny_models, [three, three, two], ["int4"])
    assert len(set(messages)) == 1 and messages[0].startswith("rank 2: "), messages


def test_ranks_with_different_calibrations_are_refused(ranks, tiny_models, calibrations):
    """Each would decode with other scales than its peers encoded with, and the replicas would drift apart unseen."""
    three, other = calibrations["three"], calibrations["other"]
    messages = build_errors(ranks, tiny_models, [three, other, three], ["int4-outlier"])
    assert len(set(messages)) == 1 and "differs between ranks" in messages[0], messages


def test_ranks_with_different_schemes_are_refused(ranks, tiny_models, calibrations):
    """Their packets would have other lengths: a hang or a crash later instead of an error now."""
    messages = build_errors(ranks, tiny_models, [calibrations["three"]], ["int4", "int4:one-stage", "int4"])
    assert len(set(messages)) == 1 and "differs between ranks" in messages[0], messages
