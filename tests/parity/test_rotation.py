"""Rotations: C on each of its ways and Triton's interpreter have the bits of torch, which has those of butterflies."""

import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers.golden_rotation import butterflies, dense_matrix
from helpers.messages import same_bits

from lowbit_kernels import get_backend
from lowbit_kernels.rotation import Rotation, get_rotate, rotate, scale_of, sign_bits

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WAYS = ["triton"] if INTERPRETED else ["fastest C", "plain C", "triton on cuda"]
BLOCKS = ["full", 2, 4, 16, 64, 1024]
WIDTHS = [1, 3, 16, 31, 67, 130, 257, 1031] if INTERPRETED else [*range(1, 131), 255, 257, 1000, 2049, 3584, 5120, 8195]


@pytest.fixture(params=WAYS)
def way(request):
    """A backend's `rotate`, and its device."""
    device = "cuda" if request.param == "triton on cuda" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    name = "cpu" if request.param.endswith("C") else "triton"
    try:
        found = get_rotate(get_backend(name, device))
    except ValueError as error:
        pytest.skip(str(error))
    if name == "triton":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the interpreter's, of infinite sums
            yield found, device
        return
    from lowbit_kernels.cpu_library import library

    library().lowbit_only_plain(request.param == "plain C")
    yield found, device
    library().lowbit_only_plain(0)


def drawn(features, seed=0):
    """Rows that overflow, that hold values not finite, denormal ones and zeros, apart from each other."""
    generator = torch.Generator().manual_seed(1000 * seed + features)
    rows = torch.randn(6, features + 3, generator=generator)[:, :features]
    rows[1] *= 3e37
    rows[2] *= 1e-41
    rows[3, features // 2], rows[3, 0] = math.inf, -math.inf
    rows[4, features // 3] = -math.nan
    rows[5] = torch.where(torch.rand(features, generator=generator) < 0.5, -0.0, rows[5].round())
    return rows


@pytest.mark.parametrize("block", BLOCKS)
def test_backends_have_the_bits_of_torch(way, block):
    found, device = way
    for features in WIDTHS:
        rotation = Rotation(features, block)
        for inverse in (False, True):
            rows = drawn(features)
            got = torch.full((6, features + 5), 7.0, device=device)
            got[:, :features] = rows.to(device)
            rotate(rows, rotation, inverse)
            found(got[:, :features], rotation, inverse)
            assert same_bits(got[:, :features].cpu(), rows), (features, inverse)
            assert (got[:, features:] == 7.0).all(), "wrote behind a row"


def test_no_rows(way):
    found, device = way
    found(torch.empty(0, 70, device=device), Rotation(70, "full"))


@pytest.mark.parametrize("block", BLOCKS)
def test_torch_has_the_bits_of_butterflies(block):
    """Against NumPy, which builds transforms from halves of themselves."""
    for features in WIDTHS:
        for inverse in (False, True):
            rows = drawn(features)
            expected = butterflies(rows.numpy().copy(), block, inverse)
            rotate(rows, Rotation(features, block), inverse)
            np.testing.assert_array_equal(rows.contiguous().numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("block", BLOCKS)
def test_it_is_an_orthogonal_matrix(block):
    for features in [*range(1, 20), 63, 65, 130, 257]:
        matrix = dense_matrix(features, block)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(features), atol=1e-12)
        rows = torch.eye(features)
        rotate(rows, Rotation(features, block))
        # each of at most 2 log2(H) steps and 2 products rounds by half an ulp, relative to a row's norm of 1
        bound = (2 * math.log2(features + 1) + 3) * 2.0**-24
        np.testing.assert_allclose(rows.numpy().T, matrix, atol=bound)
        rotate(rows, Rotation(features, block), inverse=True)
        np.testing.assert_allclose(rows.numpy(), np.eye(features), atol=2 * bound)


@pytest.mark.parametrize("features", [576, 577, 1000, 2048, 3001, 5120])
def test_no_feature_stands_out_anywhere(features):
    """Of one large feature, alone or beside a level that all have, no output gets much more than its share."""
    largest = 1 << (features.bit_length() - 1)
    rows = torch.eye(features)
    rotate(rows, Rotation(features, "full"))
    # its share is 1 / sqrt(n); a random walk's largest of H^2 outputs is about sqrt(2 ln H^2) times as large
    assert rows.abs().max() < 1.1 * math.sqrt(4 * math.log(features) / largest)
    level = torch.ones(1, features)
    rotate(level, Rotation(features, "full"))
    assert level.abs().max() < 6


def test_signs_are_these():
    """A change would make packets of two versions unreadable for each other."""
    run = Rotation(9, "full").runs[1]
    assert (run.start, run.size, run.number) == (1, 8, 1)
    assert (sign_bits(run, torch.device("cpu")) < 0).int().tolist() == [0, 1, 1, 0, 0, 0, 1, 1]
    many = (sign_bits(Rotation(2**16, "full").runs[0], torch.device("cpu")) < 0).float()
    assert abs(many.mean() - 0.5) < 4 * 0.5 / 2**8  # four standard deviations


def test_runs():
    assert [(run.start, run.size, run.count) for run in Rotation(173, 64).runs] == [
        *((0, 64, 2), (128, 32, 1), (160, 8, 1), (168, 4, 1), (172, 1, 1))
    ]
    assert [(run.start, run.size, run.count) for run in Rotation(5, 64).runs] == [(0, 4, 1), (4, 1, 1)]
    assert [(run.start, run.size) for run in Rotation(576, "full").runs] == [(0, 512), (64, 512)]
    assert [(run.start, run.size) for run in Rotation(512, "full").runs] == [(0, 512)]
    for log in range(20):
        assert scale_of(2**log) == np.float32(2.0 ** (-log / 2))


@pytest.mark.parametrize("block", [0, 1, 3, 48, -2])
def test_other_blocks_are_refused(block):
    with pytest.raises(ValueError, match=f"blocks of {block}; allowed: powers of two from 2 on"):
        Rotation(64, block)


def test_rows_that_do_not_fit_are_refused(way):
    found, device = way
    for rows in (torch.zeros(2, 63), torch.zeros(64), torch.zeros(2, 64, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"rotate takes torch.float32 \[T, 64\]"):
            found(rows.to(device), Rotation(64, 16))
    with pytest.raises(ValueError, match="must be adjacent"):
        found(torch.zeros(64, 2, device=device).T, Rotation(64, 16))


def test_triton_interpreter():
    """The same tests for the Triton kernel on a CPU."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    command += ["-k", "not interpreter", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and " skipped" not in run.stdout, run.stdout
