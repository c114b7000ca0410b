"""`tune`: measures which collective serves which message size best on this cluster, and writes it as a policy."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from lowbit_tools import local_ranks, model_arguments, output
from lowbit_tools.policy_tuning import tune
from megatron_lowbit.comm.policy import save_policy

NAME = "tune"
HELP = "Measure which collective is fastest for which message size on this cluster; write a policy file."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="policy file to write (JSON)")
    parser.add_argument(
        "--scheme", default="int4-outlier", help="what large messages will travel as (default: int4-outlier)"
    )
    parser.add_argument("--hidden", type=int, default=4096, metavar="H", help="features a token (default: 4096)")
    parser.add_argument("--seconds", type=float, default=40.0, metavar="S", help="time to spend, about (default: 40)")
    parser.add_argument(
        "--backend", default="auto", choices=("auto", "torch", "cpu", "triton"), help="codec implementation"
    )
    local_ranks.add_arguments(parser, virtual=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and all timings as JSON")


def check(args: argparse.Namespace) -> None:
    """ValueError for arguments that make no sense, before any rank starts."""
    (scheme,) = model_arguments.parse_schemes(args.scheme)
    if scheme.gather_stage is None:
        raise ValueError(f"--scheme {args.scheme} is one-stage already; a policy chooses for two-stage schemes")
    if args.hidden < 1 or not 1 <= args.seconds <= 3600:
        raise ValueError(f"--hidden is {args.hidden}, --seconds is {args.seconds:g}; at least 1, and 1 to 3600 seconds")


def run(args: argparse.Namespace) -> None:
    (scheme,) = model_arguments.parse_schemes(args.scheme)
    context = local_ranks.context_of(args)
    if context.size < 2:
        raise ValueError("tuning needs at least 2 ranks: pass --tp N or start it with torchrun")
    with output.progress_bar("tuning (message sizes)", context) as progress:
        policy, tuned = tune(context, scheme, args.hidden, args.seconds, args.backend, progress=progress)
    rows = [asdict(row) for row in tuned]
    assert context.transport is not None
    facts = output.conditions(
        context, scheme=args.scheme, hidden=args.hidden, transport=context.transport.name, backend=args.backend
    )
    columns = {
        "tokens": lambda row: str(row["tokens"]),
        "chosen": lambda row: row["choice"],
        "median µs": lambda row: f"{row['median_us'][row['choice']]:,.0f}",
        "next best": lambda row: _next_best(row["median_us"], row["choice"]),
        "torch µs": lambda row: f"{row['torch_us']:,.0f}",
        "over torch": lambda row: f"{row['torch_us'] / row['median_us'][row['choice']]:.2f}x",
        "rounds": lambda row: str(row["rounds"]),
    }
    caption = f"{args.scheme}, hidden {args.hidden}, {context.size} ranks over {context.transport.name}"
    context.together(lambda: save_policy(policy, args.out, facts) if context.is_first else None)
    screen = output.console(context)
    screen.print(output.table("Policy", rows, columns, caption))
    screen.print(f"written to {args.out}; use it with --policy {args.out}")
    output.write_json(args.json, context, facts, rows)
    context.close()


def _next_best(median_us: dict[str, float], choice: str) -> str:
    others = {name: value for name, value in median_us.items() if name != choice}
    if not others:
        return ""
    name = min(others, key=others.__getitem__)
    return f"{name} {others[name]:,.0f}"
