"""The model of `plan` beside rows that `bench-model` measured. Nothing is fitted to the rows that are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit_tools.all_reduce_bench import BASELINE
from lowbit_tools.plan_collectives import Link, ring_time
from lowbit_tools.plan_model import Machine, PassTime, pass_time, scheme_pass
from lowbit_tools.plan_shapes import ModelShape, shape_of_config
from megatron_lowbit.comm.policy import Policy, policy_from_json
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.config import ModelConfig

_POLICY_ENDING = ", policy"


@dataclass(frozen=True)
class Measured:
    """A file of `bench-model`: its conditions, rows and the model's shape."""

    path: Path
    conditions: dict[str, Any]
    rows: list[dict[str, Any]]
    shape: ModelShape

    @property
    def ranks(self) -> int:
        return int(self.conditions["tp"])

    @property
    def ranks_a_processor(self) -> float:
        """How many ranks share what one rank alone had: above 1 where a host has fewer cores than threads of ranks."""
        if not str(self.conditions["device"]).startswith("cpu"):
            return 1.0
        threads = self.ranks / self.conditions["hosts"] * self.conditions["threads_per_rank"]
        return max(1.0, threads / self.conditions["cpu_count"])


def read_measured(path: Path) -> Measured:
    """Rows of `bench-model --json`. FileNotFoundError or ValueError, naming the file, for anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; write it with `megatron-lowbit bench-model … --json {path}`")
    wrong = f"{path} does not hold rows of `megatron-lowbit bench-model --json`"
    try:
        data = json.loads(path.read_bytes())
        conditions, rows = data["conditions"], data["rows"]
        config = ModelConfig.from_json(json.dumps(conditions["config"]), str(path))
        needed = [conditions[key] for key in ("tp", "hosts", "device", "cpu_count", "threads_per_rank", "overlaps")]
        needed += [row[key] for row in rows for key in ("scheme", "prompt_tokens", "new_tokens", "ttft_s", "step_s")]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{wrong} ({type(error).__name__}: {error}); measure again with this version") from error
    if not rows or any(value is None for value in needed):
        raise ValueError(f"{wrong}; measure again with this version")
    return Measured(path, conditions, rows, shape_of_config(config, str(conditions["model"])))


def rates_alone(
    alone: Measured, prompt_tokens: int, memory_nbytes_per_s: float | None = None
) -> tuple[float, float, float]:
    """(operations a second, bytes a second from memory, seconds of overhead a pass) of one rank alone.

    From the row nearest in prompt length. Its first token is taken to be bound by operations, its later ones by memory.
    Where the memory's rate is known, what it does not explain of a later token is the overhead; else there is none.
    """
    row = min(alone.rows, key=lambda row: abs(row["prompt_tokens"] - prompt_tokens))
    (share,) = alone.shape.shares(1)
    start = _step_start(row)
    nbytes = share.read_nbytes(1, 1, start)
    overhead_s = max(0.0, row["step_s"] - nbytes / memory_nbytes_per_s) if memory_nbytes_per_s else 0.0
    flops = share.flops(1, row["prompt_tokens"], 0) / (row["ttft_s"] - min(overhead_s, row["ttft_s"] / 2))
    return flops, memory_nbytes_per_s or nbytes / row["step_s"], overhead_s


def check_alone(alone: Measured, measured: Measured) -> None:
    """ValueError unless `alone` is the same model on one rank, with as many threads."""
    if alone.ranks != 1:
        raise ValueError(f"--alone {alone.path} was measured on {alone.ranks} ranks; give rows of one rank")
    compared: dict[str, tuple[object, object]] = {
        "the model's shape": (replace(alone.shape, name=measured.shape.name), measured.shape)
    }
    for what in ("threads_per_rank", "dtype"):
        compared[what] = alone.conditions.get(what), measured.conditions.get(what)
    for what, (mine, other) in compared.items():
        if mine != other:
            raise ValueError(f"--alone {alone.path} differs from {measured.path} in {what}: {mine!r} and {other!r}")


@dataclass(frozen=True)
class Rates:
    """Machine constants that were given; None: taken from the rows of one rank."""

    flops: float | None
    memory_nbytes_per_s: float | None
    codec_nbytes_per_s: float | None
    #: of a whole small all-reduce of torch's; None: 2 (R - 1) latencies of the link
    torch_latency_s: float | None = None

    def missing(self, alone: Measured | None) -> list[str]:
        """Flags that must be given as well."""
        codecs = None if alone is None else alone.conditions.get("codec_nbytes_per_s")
        wanted = {
            "--flops": self.flops or alone,
            "--memory-bandwidth": self.memory_nbytes_per_s or alone,
            "--codec-bandwidth": self.codec_nbytes_per_s or codecs,
        }
        return [flag for flag, found in wanted.items() if not found]


def validate(measured: Measured, rates: Rates, alone: Measured | None, link: Link) -> list[dict[str, Any]]:
    """A row for each measured one: both phases, modelled and measured, and the error of the model.

    error: modelled / measured - 1. Raises ValueError where a constant is neither given nor in `alone`, or a scheme is
    unknown.
    """
    if measured.ranks == 1:
        raise ValueError(f"{measured.path} was measured on one rank: nothing was sent; give rows of several")
    if alone is not None:
        check_alone(alone, measured)
    if missing := rates.missing(alone):
        raise ValueError(f"{', '.join(missing)}: give them, or --alone FILE of `bench-model` on one rank")
    policy = None
    if measured.conditions.get("policy") is not None:
        policy = policy_from_json(measured.conditions["policy"], str(measured.path))
    rows = []
    for row in measured.rows:
        machine = _machine(row, rates, alone, link).shared_by(measured.ranks_a_processor)
        if row["scheme"] == BASELINE and rates.torch_latency_s is not None:
            step_latency = rates.torch_latency_s / (2 * (measured.ranks - 1))
            machine = replace(machine, link=replace(machine.link, latency_s=step_latency))
        first = _pass(measured, row, machine, policy, row["prompt_tokens"], 0)
        step = _pass(measured, row, machine, policy, 1, _step_start(row))
        rows.append(
            {
                "prompt_tokens": row["prompt_tokens"],
                "scheme": row["scheme"],
                "tp": measured.ranks,
                "ttft_measured_s": row["ttft_s"],
                "ttft_modelled_s": first.seconds,
                "ttft_error": first.seconds / row["ttft_s"] - 1,
                "ttft_modelled_compute_s": first.compute_s,
                "ttft_modelled_communication_s": first.communication_s,
                "step_measured_s": row["step_s"],
                "step_modelled_s": step.seconds,
                "step_error": step.seconds / row["step_s"] - 1,
                "step_modelled_compute_s": step.compute_s,
                "step_modelled_communication_s": step.communication_s,
                "flops": machine.flops,
                "memory_nbytes_per_s": machine.memory_nbytes_per_s,
                "codec_nbytes_per_s": machine.codec_nbytes_per_s,
                "overhead_s": machine.overhead_s,
                "latency_s": machine.link.latency_s,
            }
        )
    return rows


def _step_start(row: Mapping[str, Any]) -> int:
    """Tokens in the cache half way through the measured steps."""
    return int(row["prompt_tokens"] + row["new_tokens"] // 2)


def _machine(row: Mapping[str, Any], rates: Rates, alone: Measured | None, link: Link) -> Machine:
    flops, memory, codec = rates.flops, rates.memory_nbytes_per_s, rates.codec_nbytes_per_s
    overhead_s = 0.0
    if alone is not None:
        own_flops, own_memory, overhead_s = rates_alone(alone, row["prompt_tokens"], memory)
        flops, memory = flops or own_flops, memory or own_memory
        if codec is None:
            codecs = alone.conditions["codec_nbytes_per_s"]
            name = row["scheme"].removesuffix(_POLICY_ENDING)
            # torch's own all-reduce has no codec: whatever stands here is not used
            codec = codecs[next(iter(codecs))] if name == BASELINE else codecs.get(name)
    if codec is None:
        raise ValueError(f"no codec speed of {row['scheme']!r} in the rows of one rank; give --codec-bandwidth")
    assert flops is not None and memory is not None
    return Machine(flops, memory, codec, link, overhead_s)


def _pass(
    measured: Measured, row: Mapping[str, Any], machine: Machine, policy: Policy | None, tokens: int, start: int
) -> PassTime:
    shape, ranks, name = measured.shape, measured.ranks, row["scheme"]
    if name == BASELINE:
        all_reduce = ring_time(tokens, shape.hidden, ranks, machine.link)
        return pass_time(shape, ranks, machine, all_reduce, 1, tokens, start)
    scheme = parse_scheme(name.removesuffix(_POLICY_ENDING))
    followed = policy if name.endswith(_POLICY_ENDING) else None
    return scheme_pass(shape, ranks, machine, scheme, followed, 1, tokens, start)


def largest_errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The error of largest size of each phase."""
    return {phase: max((row[f"{phase}_error"] for row in rows), key=abs) for phase in ("ttft", "step")}
