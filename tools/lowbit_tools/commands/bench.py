"""`bench`: latency of the collectives themselves, beside torch's all-reduce in the same interleaved run."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from lowbit_tools import local_ranks, model_arguments, output
from lowbit_tools.all_reduce_bench import bench_all_reduce

NAME = "bench"
HELP = "Time the collectives on this cluster's links."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("all-reduce",), help="what to time")
    parser.add_argument(
        "--tokens", default="1,16,128,1024", help="message sizes, comma-separated (default: 1,16,128,1024)"
    )
    parser.add_argument("--hidden", type=int, default=4096, metavar="H", help="features a token (default: 4096)")
    parser.add_argument("--schemes", default="bf16,int4-outlier", help="comma-separated (default: bf16,int4-outlier)")
    parser.add_argument("--rounds", type=int, default=50, metavar="N", help="interleaved rounds (default: 50)")
    parser.add_argument(
        "--backend", default="auto", choices=("auto", "torch", "cpu", "triton"), help="codec implementation"
    )
    local_ranks.add_arguments(parser, virtual=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and rows as JSON")


def check(args: argparse.Namespace) -> None:
    """ValueError for arguments that make no sense, before any rank starts."""
    sizes = _sizes(args.tokens)
    model_arguments.parse_schemes(args.schemes)
    for flag, value, least in (("--tokens", min(sizes), 0), ("--hidden", args.hidden, 1), ("--rounds", args.rounds, 1)):
        if value < least:
            raise ValueError(f"{flag} is {value}; it must be at least {least}")


def _sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--tokens is {text!r}; give whole numbers separated by commas") from error


def run(args: argparse.Namespace) -> None:
    schemes, sizes = model_arguments.parse_schemes(args.schemes), _sizes(args.tokens)
    context = local_ranks.context_of(args)
    if context.size < 2:
        raise ValueError("an all-reduce needs at least 2 ranks: pass --tp N or start it with torchrun")
    with output.progress_bar("timing (messages)", context) as progress:
        timed = bench_all_reduce(context, sizes, args.hidden, schemes, args.rounds, args.backend, progress)
    rows = [asdict(row) for row in timed]
    facts = output.conditions(context, rounds=args.rounds, dtype="bf16", backend=args.backend)
    columns = {
        "tokens": lambda row: str(row["tokens"]),
        "scheme": lambda row: row["scheme"],
        "median µs": lambda row: f"{row['median_us']:,.0f}",
        "p10": lambda row: f"{row['p10_us']:,.0f}",
        "p90": lambda row: f"{row['p90_us']:,.0f}",
        "speed-up over torch": lambda row: f"{row['ratio_to_torch_all_reduce']:.2f}x",
    }
    caption = (
        f"hidden {args.hidden}, bf16 partials, {context.size} ranks on {facts['device']}, {args.rounds} rounds, "
        f"interleaved, slowest rank of each; torch {facts['torch']}"
    )
    output.console(context).print(output.table("All-reduce", rows, columns, caption))
    output.write_json(args.json, context, facts, rows)
    context.close()
