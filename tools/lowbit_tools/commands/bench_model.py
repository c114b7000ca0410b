"""`bench-model`: time to first token and decode speed of a whole model, schemes beside torch's all-reduce."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from lowbit_tools import local_ranks, model_arguments, output
from lowbit_tools.codec_speed import codec_nbytes_per_s
from lowbit_tools.communication_clock import CommunicationClock, TimedTransport
from lowbit_tools.model_bench import OWN_CALIBRATION, bench_model, own_calibration, variants
from lowbit_tools.model_config import config_path, read_config
from lowbit_tools.random_weights import random_weights
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.weights import DTYPES, ModelWeights, load_weights

NAME = "bench-model"
HELP = "Time a whole model on this cluster: first token, later tokens, and the share of communication."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, nargs="?", metavar="MODEL", help="converted checkpoint or Hugging Face directory"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="instead of MODEL: a config.json alone, with random weights"
    )
    parser.add_argument("--random-weights", action="store_true", help="random weights of MODEL's shapes")
    parser.add_argument(
        "--schemes", default="bf16,int4-outlier",
        help="comma-separated, files of `megatron-lowbit tune-scheme` too (default: bf16,int4-outlier)",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE",
        help="from `megatron-lowbit calibrate` (default: ranges of a few random sequences, which take as long)",
    )  # fmt: skip
    parser.add_argument("--prompt-tokens", default="512,2048", help="comma-separated (default: 512,2048)")
    parser.add_argument(
        "--new-tokens", type=int, default=16, metavar="N", help="tokens after each prompt, at least 2 (default: 16)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="interleaved rounds (default: 5)")
    model_arguments.add_policy_argument(parser, "time schemes below 16 bits under this policy too")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="weights and activations (default: bf16)")
    local_ranks.add_arguments(parser, virtual=False)
    parser.add_argument(
        "--backend", default="auto", choices=("auto", "torch", "cpu", "triton"), help="codec implementation"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and rows as JSON")


def check(args: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError for arguments that make no sense, before any rank starts."""
    if (args.model is None) == (args.config is None):
        raise ValueError("give either MODEL or --config FILE: the one says where weights are, the other has none")
    if args.config is not None:
        config_path(args.config)
    if args.calibration is not None and (args.config is not None or args.random_weights):
        raise ValueError("--calibration belongs to a checkpoint's own weights; leave it out for random ones")
    model_arguments.check_schemes(args.schemes)
    prompt_lengths(args.prompt_tokens)
    for flag, value, least in (("--new-tokens", args.new_tokens, 2), ("--rounds", args.rounds, 1)):
        if value < least:
            raise ValueError(f"{flag} is {value}; it must be at least {least}")


def prompt_lengths(text: str) -> list[int]:
    """Whole numbers of at least 1 from a comma-separated list; ValueError for anything else."""
    try:
        lengths = [int(length) for length in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--prompt-tokens is {text!r}; give whole numbers separated by commas") from error
    if min(lengths) < 1:
        raise ValueError(f"--prompt-tokens is {text!r}; each must be at least 1")
    return lengths


def run(args: argparse.Namespace) -> None:
    lengths = prompt_lengths(args.prompt_tokens)
    context = local_ranks.context_of(args)
    given = model_arguments.load_schemes(args.schemes, context)
    clock = CommunicationClock(context.device)
    if context.transport is not None:
        context = replace(context, transport=TimedTransport(context.transport, clock))
    weights = _weights(args, context)
    config = weights.config
    if max(lengths) + args.new_tokens > config.max_position:
        raise ValueError(
            f"--prompt-tokens {max(lengths)} and --new-tokens {args.new_tokens} do not fit the model's context of "
            f"{config.max_position} tokens; ask for fewer"
        )
    policy = model_arguments.load_policy(args.policy, context) if context.size > 1 else None
    calibration = model_arguments.load_calibration(args.calibration, context)
    scales = str(args.calibration)
    named = [scheme for scheme in given if isinstance(scheme, CommScheme)]
    if calibration is None and context.size > 1 and any(scheme.needs_calibration for scheme in named):
        calibration = own_calibration(weights)
        scales = "ranges of {} sequences of {} random tokens".format(*OWN_CALIBRATION)
    candidates = variants(weights, given, calibration, policy, args.backend, clock)
    schemes = [scheme if isinstance(scheme, CommScheme) else scheme.scheme for scheme in given]
    with output.progress_bar("timing (rounds)", context) as progress:
        timed = bench_model(candidates, lengths, args.new_tokens, args.rounds, clock, progress)
    rows = [asdict(row) for row in timed]
    transport = context.transport
    facts = output.conditions(
        context,
        model=str(args.model or args.config),
        weights=weights.fingerprint if args.config or args.random_weights else "checkpoint",
        config=asdict(config),
        dtype=model_arguments.dtype_name(weights),
        backend=args.backend,
        transport=transport and transport.name,
        overlaps=transport is not None and transport.overlaps,
        hosts=len(set(context.all_gather_json(socket.gethostname()))),
        prompts="random tokens",
        scales=scales if calibration is not None else None,
        policy=policy and policy.to_json(),
        codec_nbytes_per_s=_codec_speeds(schemes, weights, args.backend),
    )
    screen = output.console(context)
    for table in tables(rows, facts):
        screen.print(table)
    output.write_json(args.json, context, facts, rows)
    context.close()


def _weights(args: argparse.Namespace, context: ParallelContext) -> ModelWeights:
    dtype = None if args.dtype is None else DTYPES[args.dtype]
    if args.config is None and not args.random_weights:
        with output.progress_bar(f"loading {args.model.name}", context) as progress:
            return load_weights(args.model, context, dtype, progress)
    config = context.together(lambda: read_config(args.config or args.model))
    context.agree_same(config.digest(), "the model")
    return context.together(lambda: random_weights(config, context, dtype or DTYPES["bf16"]))


def _codec_speeds(schemes: Sequence[CommScheme], weights: ModelWeights, backend: str) -> dict[str, float] | None:
    """One rank has the machine to itself: the codec's constants for `plan --validate` are measured there."""
    if weights.context.size > 1:
        return None
    hidden, device = weights.config.hidden_size, weights.context.device
    return {scheme.name: codec_nbytes_per_s(scheme, hidden, device, backend) for scheme in schemes}


def tables(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[Table]:
    """Time to first token, then decode, with the conditions below."""

    def against_torch(row: Mapping[str, Any], phase: str) -> str:
        if row[f"{phase}_ratio_to_torch"] is None:
            return "-"
        low, high = row[f"{phase}_ratio_interval"]
        return f"{row[f'{phase}_ratio_to_torch']:.2f}x ({low:.2f}-{high:.2f})"

    def nbytes(row: Mapping[str, Any], phase: str) -> str:
        sent = row[f"{phase}_sent_nbytes"]
        return ("-" if sent is None else f"{sent:,}") + f" + {row[f'{phase}_elsewhere_nbytes']:,}"

    def columns(phase: str, speed: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "prompt": lambda row: f"{row['prompt_tokens']:,}",
            "scheme": lambda row: row["scheme"],
            "took": lambda row: row[f"{phase}_collective"],
            **speed,
            "over torch (95 %)": lambda row: against_torch(row, phase),
            "sync points": lambda row: f"{100 * row[f'{phase}_sync_share']:.0f} %",
            "elsewhere ms": lambda row: f"{1e3 * row[f'{phase}_elsewhere_s']:.1f}",
            "bytes sent": lambda row: nbytes(row, phase),
        }

    caption = (
        f"{facts['model']}, {facts['weights']}, {facts['dtype']}, {facts['tp']} ranks on {facts['device']}, "
        f"{facts['threads_per_rank']} thread(s) a rank, torch {facts['torch']}, "
        f"over {facts['transport'] or 'nothing'}; {rows[0]['rounds']} interleaved rounds, medians, "
        "slowest rank; batch 1, random tokens"
        + (f"; scales from {facts['scales']}" if facts["scales"] else "")
        + ". Sync points: share of the time that the rank with most work of its own spends there; elsewhere: embedding "
        "rows and best tokens. Bytes: at sync points + elsewhere, busiest rank."
    )
    first = {"ms": lambda row: f"{1e3 * row['ttft_s']:,.1f}"}
    later = {
        "tokens/s": lambda row: f"{row['decode_tokens_per_s']:,.1f}",
        "ms": lambda row: f"{1e3 * row['step_s']:,.1f}",
    }
    return [
        output.table("Time to first token", rows, columns("ttft", first), ""),
        output.table("Decode, one token at a time", rows, columns("step", later), caption),
    ]
