"""Modelled time to first token and time per token, at 16 bits and under a scheme. Nothing here is measured.

    a pass = compute + sync points * one all-reduce + elsewhere

compute: max(operations / rate, bytes of weights, keys and values / memory bandwidth), of the rank for which it is
longest, plus an overhead a pass that more ranks do not shorten (launches, interpreter). one all-reduce: see
`plan_collectives`. elsewhere: one latency and the embedding's rows (all ranks send the rows they hold, 16 bits in
either case), and one latency for the best tokens. Not modelled: norms, activations' memory traffic, and ranks that wait
for each other.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from lowbit_tools.plan_collectives import CollectiveTime, Link, choice_for, collective_time
from lowbit_tools.plan_shapes import ModelShape
from megatron_lowbit.comm.policy import Policy
from megatron_lowbit.comm.schemes import CommScheme, parse_scheme

#: a candidate of the best token: logit and number
_CANDIDATE_NBYTES = 8


@dataclass(frozen=True)
class Machine:
    """One rank: operations a second, bytes a second from memory and through the codec, its link, overhead of a pass."""

    flops: float
    memory_nbytes_per_s: float
    codec_nbytes_per_s: float
    link: Link
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        rates = (self.flops, self.memory_nbytes_per_s, self.codec_nbytes_per_s, self.link.nbytes_per_s)
        if min(rates) <= 0 or min(self.link.latency_s, self.overhead_s) < 0:
            raise ValueError(f"machine {self}: rates must be above 0, latency and overhead at least 0")

    def shared_by(self, count: float) -> Machine:
        """The same where `count` ranks share the processor that these rates are of; the link is not shared."""
        rates = self.flops / count, self.memory_nbytes_per_s / count, self.codec_nbytes_per_s / count
        return Machine(*rates, self.link, self.overhead_s * count)


@dataclass(frozen=True)
class PassTime:
    """One forward pass."""

    seconds: float
    compute_s: float
    communication_s: float
    elsewhere_s: float
    all_reduce: CollectiveTime


def pass_time(
    shape: ModelShape, ranks: int, machine: Machine, all_reduce: CollectiveTime, batch: int, tokens: int, start: int
) -> PassTime:
    """A pass of `tokens` new tokens for each of `batch` sequences, behind `start` earlier ones."""
    compute = max(
        max(
            share.flops(batch, tokens, start) / machine.flops,
            share.read_nbytes(batch, tokens, start) / machine.memory_nbytes_per_s,
        )
        for share in shape.shares(ranks)
    )
    compute += machine.overhead_s
    elsewhere = 0.0
    if ranks > 1:
        rows_nbytes = 2 * batch * tokens * shape.hidden * (ranks - 1) / ranks
        candidates_nbytes = (ranks - 1) * batch * _CANDIDATE_NBYTES
        elsewhere = 2 * machine.link.latency_s + (rows_nbytes + candidates_nbytes) / machine.link.nbytes_per_s
    communication = shape.sync_points * all_reduce.seconds
    return PassTime(compute + communication + elsewhere, compute, communication, elsewhere, all_reduce)


def scheme_pass(
    shape: ModelShape,
    ranks: int,
    machine: Machine,
    scheme: CommScheme,
    policy: Policy | None,
    batch: int,
    tokens: int,
    start: int,
) -> PassTime:
    """A pass whose sync points use `scheme`, under a policy or at every size."""
    choice = choice_for(scheme, policy, batch * tokens, shape.hidden)
    all_reduce = collective_time(
        scheme, choice, batch * tokens, shape.hidden, ranks, machine.link, machine.codec_nbytes_per_s
    )
    return pass_time(shape, ranks, machine, all_reduce, batch, tokens, start)


def plain_pass(
    shape: ModelShape, ranks: int, machine: Machine, like: CommScheme, policy: Policy | None, batch: int, tokens: int,
    start: int,
) -> PassTime:  # fmt: skip
    """The same pass at 16 bits: as many stages as `like` takes, plain values, and no codec to pay for."""
    plain = parse_scheme("bf16" if like.gather_stage is not None else "bf16:one-stage")
    choice = choice_for(plain, policy, batch * tokens, shape.hidden)
    all_reduce = collective_time(plain, choice, batch * tokens, shape.hidden, ranks, machine.link, math.inf)
    return pass_time(shape, ranks, machine, all_reduce, batch, tokens, start)


@dataclass(frozen=True)
class Prediction:
    """Both phases for one prompt length, at 16 bits and under the scheme."""

    model: str
    scheme: str
    tp: int
    batch: int
    prompt_tokens: int
    weights_nbytes: int
    first_16: PassTime
    first: PassTime
    step_16: PassTime
    step: PassTime

    @property
    def first_gain(self) -> float:
        return self.first_16.seconds / self.first.seconds

    @property
    def step_gain(self) -> float:
        return self.step_16.seconds / self.step.seconds

    def row(self) -> dict[str, Any]:
        """One flat JSON object, marked as modelled."""
        flat: dict[str, Any] = {"modelled": True}
        for name, value in asdict(self).items():
            if not isinstance(value, dict):
                flat[name] = value
                continue
            all_reduce = value.pop("all_reduce")
            flat |= {f"{name}_{key}": part for key, part in value.items()}
            flat |= {f"{name}_all_reduce_{key}": part for key, part in all_reduce.items()}
        return flat | {"first_gain": self.first_gain, "step_gain": self.step_gain}


def predict(
    shape: ModelShape,
    ranks: int,
    machine: Machine,
    scheme: CommScheme,
    policy: Policy | None,
    prompt_tokens: int,
    batch: int = 1,
) -> Prediction:
    """Time to first token of `batch` prompts, and per token right behind them. ValueError for counts below 1."""
    for name, count in (("ranks", ranks), ("prompt tokens", prompt_tokens), ("batch", batch)):
        if count < 1:
            raise ValueError(f"plan: {name} is {count}; it must be at least 1")
    first, step = (batch, prompt_tokens, 0), (batch, 1, prompt_tokens)
    return Prediction(
        model=shape.name,
        scheme=scheme.name,
        tp=ranks,
        batch=batch,
        prompt_tokens=prompt_tokens,
        weights_nbytes=max(share.resident_nbytes for share in shape.shares(ranks)),
        first_16=plain_pass(shape, ranks, machine, scheme, policy, *first),
        first=scheme_pass(shape, ranks, machine, scheme, policy, *first),
        step_16=plain_pass(shape, ranks, machine, scheme, policy, *step),
        step=scheme_pass(shape, ranks, machine, scheme, policy, *step),
    )
