"""`eval`: quality, bytes and speed of schemes on text, one row each."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from lowbit_tools import local_ranks, model_arguments, output
from lowbit_tools.demo_text import demo_text
from megatron_lowbit.calibration_run import text_digest
from megatron_lowbit.evaluation import DecodePath, evaluate
from megatron_lowbit.windows import text_windows

NAME = "eval"
HELP = "Measure what schemes do to a model's predictions on text."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments.add_arguments(parser)
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: prose of Python's own manual)")
    parser.add_argument(
        "--schemes", required=True,
        help="comma-separated, e.g. bf16,balanced,int4-outlier:one-stage; files of `megatron-lowbit tune-scheme` too",
    )  # fmt: skip
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="from `megatron-lowbit calibrate`")
    parser.add_argument("--windows", type=int, default=32, metavar="N", help="windows at most (default: 32)")
    parser.add_argument("--length", type=int, default=512, metavar="T", help="tokens a window (default: 512)")
    parser.add_argument(
        "--path", default="prefill", choices=("prefill", "decode"),
        help="whole windows at once, or their last tokens one by one over a KV cache (default: prefill)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, metavar="B", help="windows decoded side by side (default: 1)")
    parser.add_argument("--decode-tokens", type=int, metavar="N", help="tokens decoded of each window (default: 32)")


def check(args: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError for arguments that make no sense, before any rank starts."""
    model_arguments.check_schemes(args.schemes)
    if args.text is not None:
        model_arguments.check_text(args.text)
    for flag, value in (("--batch", args.batch), ("--decode-tokens", args.decode_tokens)):
        if value is not None and args.path != "decode":
            raise ValueError(f"{flag} {value} goes with --path decode")
        if value is not None and value < 1:
            raise ValueError(f"{flag} is {value}; it must be at least 1")


def run(args: argparse.Namespace) -> None:
    context = local_ranks.context_of(args)
    schemes = model_arguments.load_schemes(args.schemes, context)
    weights, tokenizer = model_arguments.load(args, context)
    calibration = model_arguments.load_calibration(args.calibration, context)
    text = context.together(lambda: model_arguments.read_text(args.text) if args.text else demo_text()[1])
    what = str(args.text or "the built-in text")
    windows = context.together(lambda: text_windows(tokenizer, text, args.windows, args.length, 1, what))
    context.agree_same(text_digest(text), "the evaluation text")
    decode = None
    if args.path == "decode":
        decode = DecodePath(args.batch or 1, args.decode_tokens or 32)
        windows = windows[: len(windows) - len(windows) % decode.batch] or windows
    with output.progress_bar("evaluating (passes)", context) as progress:
        evaluated = evaluate(weights, schemes, windows, calibration, progress, args.backend, decode)
    rows = [asdict(row) for row in evaluated]
    facts = output.conditions(
        context, model=str(args.model), dtype=model_arguments.dtype_name(weights), text=what, windows=len(windows),
        length=args.length, path=args.path, batch=decode.batch if decode else None,
        decode_tokens=decode.tokens if decode else None, hidden=weights.config.hidden_size,
        calibration_sequences=calibration.sequences if calibration else None,
    )  # fmt: skip
    output.console(context).print(quality_table(rows, facts))
    output.write_json(args.json, context, facts, rows)
    context.close()


def quality_table(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Table:
    """The table a user decides from, with its conditions below."""

    def bits(row: Mapping[str, Any]) -> str:
        gather = row["gather_bits_per_value"]
        return f"{row['reduce_bits_per_value']:.2f} / " + ("-" if gather is None else f"{gather:.2f}")

    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "scheme": lambda row: row["scheme"],
        "bits/value\nreduce / gather": bits,
        "bytes/token\nper rank": lambda row: f"{row['sent_nbytes_per_token_per_rank']:,.0f}",
        "perplexity": lambda row: f"{row['perplexity']:.2f}",
        "perplexity\nto exact": lambda row: f"{100 * (row['perplexity_ratio'] - 1):+.1f} %",
        "KL\n(nats/token)": lambda row: f"{row['kl_mean']:.4f} ± {row['kl_stderr']:.4f}",
        "top-1\nagreement": lambda row: f"{100 * row['top1_agreement']:.1f} %",
        "saturated": lambda row: f"{100 * row['saturated_share']:.2f} %",
    }
    for speed, digits in (("prefill", 0), ("decode", 1)):
        if rows and rows[0][f"{speed}_tokens_per_s"] is not None:
            columns[f"{speed}\ntokens/s"] = functools.partial(_speed, f"{speed}_tokens_per_s", digits)
    ranks = f"{facts['tp']} {'virtual ' if facts['virtual_ranks'] else ''}ranks"
    caption = (
        f"{facts['model']}, {facts['dtype']}, {ranks}, {facts['windows']} windows of {facts['length']} tokens of "
        f"{facts['text']}; {facts['device']}, {facts['threads_per_rank']} thread(s) a rank, torch {facts['torch']}"
    )
    if facts.get("path") == "decode":
        caption += f"; the last {facts['decode_tokens']} of each decoded one by one, {facts['batch']} window(s) at once"
    return output.table("Quality and cost against the exact sum", rows, columns, caption)


def _speed(key: str, digits: int, row: Mapping[str, Any]) -> str:
    return f"{row[key]:,.{digits}f}"
