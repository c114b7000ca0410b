"""Running ranges against a loop in plain Python, and a calibration of a whole model against one by hand."""

from __future__ import annotations

import random

import pytest
import torch
from helpers.model_cases import prompt_of

from megatron_lowbit.calibration.observer import ObservingAllReduce, RangeObserver, RatioObserver
from megatron_lowbit.calibration_run import calibrate, text_digest
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.weights import load_weights


def moving_range(sequences: list[list[float]]) -> tuple[float, float]:
    """`m <- (1 - g) m + g min(seq)` with `g = max(0.01, 1/n)`, in double precision."""
    minimum = maximum = 0.0
    for number, values in enumerate(sequences, start=1):
        factor = max(0.01, 1 / number)
        minimum = (1 - factor) * minimum + factor * min(values)
        maximum = (1 - factor) * maximum + factor * max(values)
    return minimum, maximum


@pytest.mark.parametrize("count", [1, 2, 3, 99, 100, 101, 250])
def test_ranges_equal_the_plain_loop(count):
    rng = random.Random(count)
    lengths = [rng.randrange(1, 6) for _ in range(count)]
    # [sequence][rank][token][feature]; a drift makes the order of sequences matter
    data = [
        [[[rng.gauss(0.02 * n, 2) for _ in range(3)] for _ in range(length)] for _ in range(2)]
        for n, length in enumerate(lengths)
    ]
    observer = RangeObserver()
    for sequence in data:
        observer.update(torch.tensor(sequence))
    assert observer.sequences == count
    assert observer.minimum is not None and observer.maximum is not None
    for rank in range(2):
        for feature in range(3):
            column = [[token[feature] for token in sequence[rank]] for sequence in data]
            low, high = moving_range(column)
            # FP32, one rounding of 2^-24 a sequence in numbers below 16; the factor keeps old ones from adding up
            assert float(observer.minimum[rank, feature]) == pytest.approx(low, abs=1e-5)
            assert float(observer.maximum[rank, feature]) == pytest.approx(high, abs=1e-5)


def test_the_first_hundred_sequences_count_alike_and_later_ones_by_a_hundredth():
    observer = RangeObserver()
    for value in (4.0, 0.0, 0.0, 0.0):
        observer.update(torch.full((1, 1, 1), value))
    assert observer.maximum is not None and observer.maximum.item() == pytest.approx(1.0)
    for _ in range(96):
        observer.update(torch.full((1, 1, 1), 1.0))
    assert observer.maximum.item() == pytest.approx(1.0)
    observer.update(torch.full((1, 1, 1), 101.0))
    assert observer.maximum.item() == pytest.approx(2.0)  # 1 + (101 - 1) / 100


def test_ranges_of_bf16_values_are_kept_in_fp32():
    observer = RangeObserver()
    for _ in range(3):
        observer.update(torch.tensor([[[1.0, -2.0], [3.0, 0.5]]], dtype=torch.bfloat16))
    assert observer.minimum is not None and observer.minimum.dtype == torch.float32
    assert observer.minimum.tolist() == [[1.0, -2.0]]


def test_observing_passes_the_sum_on_and_sees_partials_and_sum():
    observing = ObservingAllReduce(lambda partial_LTH: partial_LTH.sum(dim=0))
    partials = torch.tensor([[[1.0, -2.0], [5.0, 0.0]], [[-3.0, 1.0], [0.0, 4.0]]])
    residual = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    joined = observing.join(partials, residual, torch.tensor([10.0, 20.0]), torch.zeros(2, 2), None, None)
    assert joined.tolist() == [[9.0, 20.0], [17.0, 26.0]]
    # root mean squares over both tokens; of a row of each rank's partial over the sum's, by least squares
    assert observing.partial_rms.rms.square().flatten().tolist() == pytest.approx([13.0, 2.0, 4.5, 8.5])
    assert observing.sum_rms.rms.square().flatten().tolist() == pytest.approx([14.5, 8.5])
    shares = ((1.0, (12.5 / 20.5) ** 0.5), (2.0**0.5, (8.0 / 20.5) ** 0.5))
    expected = [(a + b) / (a * a + b * b) for a, b in shares]
    assert observing.ratio.factor.tolist() == pytest.approx(expected)
    assert observing.partial.minimum is not None and observing.partial.maximum is not None
    assert observing.partial.minimum.tolist() == [[1.0, -2.0], [-3.0, 1.0]]
    assert observing.partial.maximum.tolist() == [[5.0, 0.0], [0.0, 4.0]]
    assert observing.sum.minimum is not None and observing.sum.maximum is not None
    assert observing.sum.minimum.tolist() == [[-2.0, -1.0]] and observing.sum.maximum.tolist() == [[5.0, 4.0]]


def test_an_estimated_scale_never_leaves_more_than_there_was():
    """In the mean square over tokens, however unlike a rank's shares of their sums are; a rank without heads has 0."""
    generator = torch.Generator().manual_seed(0)
    full_TH = torch.randn(500, 32, generator=generator)
    share_T1 = torch.randn(500, 1, generator=generator).mul(2).exp()  # over four decades
    partial_LTH = torch.stack((full_TH * share_T1, torch.zeros_like(full_TH)))
    observer = RatioObserver()
    for rows in (slice(0, 200), slice(200, 500)):
        observer.update(partial_LTH[:, rows], full_TH[rows])
    factor, none = observer.factor.tolist()
    left_T = 1 - factor * share_T1
    assert none == 0.0 and float(left_T.square().mean()) < 1
    plain = float(1 / share_T1.mean())  # the plain mean of ratios would leave far more
    assert float((1 - plain * share_T1).square().mean()) > 2


# ---- calibrate ------------------------------------------------------------------------------------------------------


def test_calibration_holds_what_went_through_every_sync_point(tiny_models):
    """Against partial sums caught by hand with another collective in place, sequence by sequence."""
    weights = load_weights(tiny_models("biased"), ParallelContext.virtual_ranks(3), torch.float32)
    sequences = [prompt_of(127, length, length) for length in (9, 1, 14)]
    progress = []
    found = calibrate(weights, sequences, text_digest("text"), lambda done, total: progress.append((done, total)))
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]  # the last is held out of the fit and run once more
    assert (found.tp, found.hidden, found.sequences, found.length) == (3, 66, 3, 14)
    assert found.fingerprint == weights.fingerprint and found.text_sha256 == text_digest("text")
    caught: dict[str, list[torch.Tensor]] = {}

    def catching(name):
        def all_reduce(partial_LTH, add_to_TH):
            caught.setdefault(name, []).append(partial_LTH.clone())
            return add_to_TH.add_(partial_LTH[0] + partial_LTH[1] + partial_LTH[2])

        return all_reduce

    model = weights.build(catching)
    for sequence in sequences:
        model(TokenBatch.prompts([sequence], torch.device("cpu")))
    assert set(found.sync_points) == set(caught)
    assert set(caught) == {f"layers.{n}.{path}" for n in range(2) for path in ("self_attn.o_proj", "mlp.down_proj")}
    for name, partials in caught.items():
        point = found.sync_points[name]
        for rank in range(3):
            for feature in (0, 13, 65):
                low, high = moving_range([partial[rank, :, feature].tolist() for partial in partials])
                # one model call follows the other with the same operations; only the averages' rounding differs
                assert float(point.partial_min[rank, feature]) == pytest.approx(low, abs=1e-5)
                assert float(point.partial_max[rank, feature]) == pytest.approx(high, abs=1e-5)
        low, high = moving_range([partial.sum(dim=0)[:, 5].tolist() for partial in partials])
        assert float(point.sum_min[5]) == pytest.approx(low, abs=1e-4)
        assert float(point.sum_max[5]) == pytest.approx(high, abs=1e-4)


def test_calibration_needs_ranks_and_text(tiny_models):
    single = load_weights(tiny_models("sparse"), ParallelContext.single(), torch.float32)
    with pytest.raises(ValueError, match="at least 2 tensor-parallel ranks"):
        calibrate(single, [[1, 2]], "")
    virtual = load_weights(tiny_models("sparse"), ParallelContext.virtual_ranks(2), torch.float32)
    with pytest.raises(ValueError, match="at least one sequence"):
        calibrate(virtual, [], "")


def test_activations_that_overflow_are_named(tiny_models):
    weights = load_weights(tiny_models("sparse"), ParallelContext.virtual_ranks(2), torch.float32)
    tensors = {**weights.tensors, "layers.1.mlp.down_proj.weight": torch.full((32, 3), torch.inf)}
    damaged = type(weights)(weights.config, weights.context, weights.dtype, weights.fingerprint, tensors)
    with pytest.raises(ValueError, match=r"sync point layers\.1\.mlp\.down_proj produced values that are not finite"):
        calibrate(damaged, [[1, 2, 3]], "")


def test_text_digest_is_sha256_of_utf8():
    assert text_digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert text_digest("ä") != text_digest("a")
