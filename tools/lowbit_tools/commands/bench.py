"""`bench`: latency of the collectives themselves, beside torch's all-reduce in the same interleaved run."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from lowbit_tools import local_ranks, model_arguments, output, units
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
    model_arguments.add_policy_argument(parser, "also time what this policy chooses for each size")
    parser.add_argument(
        "--piece-kib", type=int, default=0, metavar="N",
        help="packet KiB of a piece in two stages (default: 0, by the size of the message)",
    )  # fmt: skip
    parser.add_argument(
        "--link", metavar="RATE", help="what a link can carry, say 1gbit: adds the share of its time that moves payload"
    )
    local_ranks.add_arguments(parser, virtual=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and rows as JSON")


def check(args: argparse.Namespace) -> None:
    """ValueError for arguments that make no sense, before any rank starts."""
    sizes = _sizes(args.tokens)
    model_arguments.parse_schemes(args.schemes)
    link_rate(args.link)
    least_values = (("--tokens", min(sizes), 0), ("--hidden", args.hidden, 1), ("--rounds", args.rounds, 1))
    for flag, value, least in (*least_values, ("--piece-kib", args.piece_kib, 0)):
        if value < least:
            raise ValueError(f"{flag} is {value}; it must be at least {least}")


def link_rate(text: str | None) -> float | None:
    """Bits a second of a rate (`1gbit`, `100mbit`); ValueError for anything else."""
    return None if text is None else units.bits_per_s(text, "--link")


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
    policy = model_arguments.load_policy(args.policy, context)
    with output.progress_bar("timing (messages)", context) as progress:
        timed = bench_all_reduce(
            context, sizes, args.hidden, schemes, args.rounds, args.backend, progress, policy, args.piece_kib << 10
        )
    rows = [asdict(row) for row in timed]
    link = link_rate(args.link)
    for row in rows:
        carries = link is not None and row["sent_nbytes"] is not None
        row["link_use"] = 8e6 * row["sent_nbytes"] / row["median_us"] / link if carries and link else None
    assert context.transport is not None
    facts = output.conditions(
        context, rounds=args.rounds, dtype="bf16", backend=args.backend, link=args.link,
        transport=context.transport.name, piece_kib=args.piece_kib, policy=policy and policy.to_json(),
    )  # fmt: skip
    columns = {
        "tokens": lambda row: str(row["tokens"]),
        "scheme": lambda row: row["scheme"],
        "took": lambda row: row["chosen"],
        "median µs": lambda row: f"{row['median_us']:,.0f}",
        "p10": lambda row: f"{row['p10_us']:,.0f}",
        "p90": lambda row: f"{row['p90_us']:,.0f}",
        "over torch": lambda row: f"{row['ratio_to_torch_all_reduce']:.2f}x",
        "95 %": lambda row: f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
    }
    if link:
        columns["link use"] = lambda row: "" if row["link_use"] is None else f"{100 * row['link_use']:.0f} %"
    caption = (
        f"hidden {args.hidden}, bf16 partials, {context.size} ranks on {facts['device']}, {args.rounds} rounds, "
        f"interleaved, slowest rank of each; torch {facts['torch']}; over {context.transport.name}"
    )
    output.console(context).print(output.table("All-reduce", rows, columns, caption))
    output.write_json(args.json, context, facts, rows)
    context.close()
