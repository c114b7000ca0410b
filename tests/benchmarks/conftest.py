"""Latency suites: `pytest tests/benchmarks` on one rank, or the same under `torchrun -m pytest` on several.

pytest-benchmark chooses round counts from its own timings, which would differ between ranks and hang a collective, so
every suite here fixes its rounds. Each round starts at a barrier and counts as long as its slowest rank.
"""

import dataclasses
import os

import pytest
import torch

from megatron_lowbit.calibration.artifact import SyncPointStatistics
from megatron_lowbit.calibration.observer import RangeObserver
from megatron_lowbit.calibration.outliers import constants_from_statistics
from megatron_lowbit.comm.all_reduce import SingleRankAllReduce, build_all_reduce
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.layers.sharded import sharded_parameters
from megatron_lowbit.models.decoder import Decoder
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.weights import ModelWeights

ROUNDS = 30


def pytest_addoption(parser):
    group = parser.getgroup("megatron_lowbit latency suites")
    group.addoption("--bench-hidden", type=int, default=4096, help="features a token in codec and collective suites")
    group.addoption("--bench-tokens", default="1,16,128,1024", help="message sizes, comma-separated")


def pytest_configure(config):
    if int(os.environ.get("RANK", "0")) > 0:  # rank 0 speaks and writes for all
        config.option.benchmark_json = None


def pytest_generate_tests(metafunc):
    if "tokens" in metafunc.fixturenames:
        sizes = [int(size) for size in metafunc.config.getoption("--bench-tokens").split(",")]
        if metafunc.config.getoption("benchmark_disable"):
            sizes = sizes[:2]  # a smoke run checks that the suite works, not how fast
        metafunc.parametrize("tokens", sizes)


@pytest.fixture(scope="session")
def hidden(request):
    return 256 if request.config.getoption("benchmark_disable") else request.config.getoption("--bench-hidden")


@pytest.fixture(scope="session")
def context():
    """The ranks torchrun started, else one."""
    found = ParallelContext.from_environment("cpu")
    yield found
    found.close()


@pytest.fixture(scope="session")
def ranked_context(context):
    """Like `context`, with two virtual ranks where there is only one real rank."""
    return context if context.size > 1 else ParallelContext.virtual_ranks(2)


@pytest.fixture
def latency(benchmark, context):
    """`latency(call, loops)`: fixed rounds from a barrier, the slowest rank's time of each; `loops` calls a round."""

    def measure(call, loops=1, rounds=ROUNDS):
        benchmark.pedantic(call, setup=context.barrier, rounds=rounds, warmup_rounds=2) if loops == 1 else (
            benchmark.pedantic(call, rounds=rounds, iterations=loops, warmup_rounds=2)
        )
        if benchmark.stats is not None:
            data = benchmark.stats.stats.data
            data[:] = [max(column) for column in zip(*context.all_gather_json(list(data)), strict=True)]
        benchmark.extra_info.update(ranks=context.size, threads=torch.get_num_threads(), torch=torch.__version__)

    return measure


@pytest.fixture
def partials(ranked_context, hidden):
    """`partials(tokens)`: bf16 `[L, T, H]` partial sums of the ranks in this process."""

    def draw(tokens):
        generator = torch.Generator().manual_seed(7 * tokens + ranked_context.rank)
        local = len(ranked_context.local_ranks)
        return torch.randn(local, tokens, hidden, generator=generator).bfloat16()

    return draw


@pytest.fixture
def all_reduce_of(ranked_context, hidden):
    """`all_reduce_of(scheme)`: its collective with scales that fit normal noise."""

    def build(scheme):
        return build_all_reduce(ranked_context, scheme, hidden, constants_of(scheme, hidden, ranked_context.size))

    return build


def constants_of(scheme, hidden, ranks):
    partial, total = RangeObserver(), RangeObserver()
    noise = torch.randn(ranks, 64, hidden, generator=torch.Generator().manual_seed(0))
    partial.update(noise)
    total.update(noise.sum(dim=0, keepdim=True))
    point = SyncPointStatistics(partial.minimum, partial.maximum, total.minimum[0], total.maximum[0])
    return constants_from_statistics(scheme, "bench", point)


BENCH_MODEL = ModelConfig(
    family="llama", hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    vocab_size=49152, max_position=8192, rms_norm_eps=1e-5, rope_theta=1e5, tie_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="session")
def random_weights(request, ranked_context):
    """Weights of SmolLM2-135M's shape (two layers of it in a smoke run), random: latency does not depend on values."""
    smoke = request.config.getoption("benchmark_disable")
    config = dataclasses.replace(BENCH_MODEL, num_layers=2, vocab_size=1000) if smoke else BENCH_MODEL
    skeleton = Decoder(ranked_context, config, torch.bfloat16, lambda name: SingleRankAllReduce())
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (0.02 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
        for name, parameter, _ in sharded_parameters(skeleton)
    }
    return ModelWeights(config, ranked_context, torch.bfloat16, "random", tensors)


@pytest.fixture
def random_model(random_weights, ranked_context):
    """`random_model(scheme)`: the random weights under a scheme."""

    def build(scheme):
        width = random_weights.config.hidden_size
        constants = constants_of(scheme, width, ranked_context.size)
        return random_weights.build(lambda name: build_all_reduce(ranked_context, scheme, width, constants))

    return build
