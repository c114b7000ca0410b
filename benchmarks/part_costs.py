"""What each part of a scheme costs one rank in processor time, on one thread: all schemes take turns.

    python benchmarks/part_costs.py [--tokens 1024] [--hidden 4096] [--ranks 4] [--schemes A,B] [--json FILE]

The steps of one all-reduce as a rank of so many does them: encode all tokens (with the codes of a predictor, what is
foretold and what was missed), sum and encode again its share of the tokens, decode all. Nothing travels. Milliseconds
of the thread's own time, medians over rounds; the factor is to the first scheme.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowbit_kernels import get_backend
from lowbit_tools import output
from lowbit_tools.joined_all_reduce import random_input, with_moments
from megatron_lowbit.calibration.artifact import SyncPointStatistics
from megatron_lowbit.calibration.outliers import constants_from_statistics
from megatron_lowbit.comm.rotated_codec import make_codec
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.parallel import ParallelContext

ROUNDS = 15
SCHEMES = (
    "int4-outlier", "int4-fitted-outlier", "int4-g64-prescaled", "int4-g64-e4m3-prescaled", "lm4-g64-e4m3-prescaled",
    "lm4-g40-e4m3-prescaled", "lm4-g64-e4m3-prescaled-rotated", "lm4-g64-e4m3-prescaled-outlier128",
    "tc4-g64-e4m3-prescaled", "lm4-g64-e4m3-prescaled:loop", "lm4-g64-e4m3-prescaled:centred",
    "lm4-g64-e4m3-prescaled:predict=16:loop", "lm4-g64-e4m3-prescaled:predict=32:loop", "balanced", "fine", "small",
)  # fmt: skip
STEPS = ("encode", "sum and encode", "decode")


def calls(name: str, partials_RTH: torch.Tensor, input_TH: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The steps of rank 0."""
    scheme = parse_scheme(name)
    ranks, tokens, hidden = partials_RTH.shape
    total_TH = partials_RTH.float().sum(0)
    point = SyncPointStatistics(
        partials_RTH.float().amin(1), partials_RTH.float().amax(1), total_TH.amin(0), total_TH.amax(0)
    )
    fixed = constants_from_statistics(scheme, "any", with_moments(point, scheme, partials_RTH.float()))
    index, backend = (fixed.body_index, fixed.outlier_index), get_backend("auto")
    reduce = make_codec(scheme.reduce_stage, hidden, backend, *index, fixed.reduce_scale_RD)
    assert scheme.gather_stage is not None
    gather = make_codec(scheme.gather_stage, hidden, backend, *index, fixed.gather_scale_1D)
    predictor = None if fixed.predictor is None else fixed.predictor.to(torch.device("cpu"))
    missed_TH = torch.zeros(tokens, hidden) if scheme.loop else None
    owned = slice(0, tokens // ranks)
    owed_SH = torch.zeros(tokens // ranks, hidden) if scheme.loop else None
    packet_TB = torch.empty(tokens, reduce.layout.row_nbytes, dtype=torch.uint8)
    packets_RSB = [reduce.encode(partial_TH[owned], rank) for rank, partial_TH in enumerate(partials_RTH)]
    gathered_TB = gather.encode(total_TH, 0)
    residual_TH = torch.zeros(tokens, hidden)

    def encode() -> None:
        share = None
        if predictor is not None:
            share = predictor.share_of_rank(predictor.codes(input_TH, reduce.feedback), 0)
        reduce.encode_feedback(partials_RTH[0], 0, packet_TB, share, missed_TH)

    def sum_and_encode() -> None:
        reduce.requantize_feedback(packets_RSB, gather, gathered_TB[owned], owed_SH)

    codes_TK = None if predictor is None else predictor.codes(input_TH, reduce.feedback)

    def decode() -> None:
        share = None if predictor is None or codes_TK is None else predictor.share_of_sum(codes_TK)
        gather.decode_foretold(gathered_TB, 0, residual_TH, share)

    return dict(zip(STEPS, (encode, sum_and_encode, decode), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    partials_RTH = torch.randn(args.ranks, args.tokens, args.hidden, generator=generator).bfloat16()
    input_TH = random_input(args.tokens, args.hidden)
    steps = {name: calls(name, partials_RTH, input_TH) for name in args.schemes.split(",")}
    took: dict[tuple[str, str], list[float]] = {}
    for number in range(args.rounds + 1):
        for name, of_scheme in steps.items():
            for step, call in of_scheme.items():
                began = time.thread_time()
                call()
                if number:  # the first round warms caches
                    took.setdefault((name, step), []).append(1e3 * (time.thread_time() - began))
    rows: list[dict[str, Any]] = []
    for name in steps:
        row: dict[str, Any] = {"scheme": name}
        row |= {f"{step.replace(' ', '_')}_ms": statistics.median(took[name, step]) for step in STEPS}
        row["total_ms"] = sum(row[f"{step.replace(' ', '_')}_ms"] for step in STEPS)
        row["factor"] = row["total_ms"] / rows[0]["total_ms"] if rows else 1.0
        rows.append(row)
    context = ParallelContext.virtual_ranks(args.ranks)
    facts = output.conditions(
        context, tokens=args.tokens, hidden=args.hidden, rounds=args.rounds, ranks_played=args.ranks
    )
    columns = {"scheme": lambda row: row["scheme"]}
    for step in (*STEPS, "total"):
        key = f"{step.replace(' ', '_')}_ms"
        columns[f"{step}, ms"] = lambda row, key=key: f"{row[key]:.2f}"
    columns["factor"] = lambda row: f"{row['factor']:.2f}"
    output.console(context).print(output.table("Processor time of one rank", rows, columns, "one thread"))
    output.write_json(args.json, context, facts, rows)


if __name__ == "__main__":
    main()
