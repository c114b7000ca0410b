"""`calibrate`: runs text through the model and records the ranges at every sync point."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowbit_tools import local_ranks, model_arguments, output
from lowbit_tools.demo_text import demo_text
from megatron_lowbit.calibration_run import calibrate, text_digest
from megatron_lowbit.windows import text_windows

NAME = "calibrate"
HELP = "Record the value ranges at every sync point, once per model and tensor-parallel size."
AT_LEAST = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments.add_arguments(parser)
    parser.add_argument("out", type=Path, metavar="OUT.safetensors", help="calibration file to write")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: prose of Python's own manual)")
    parser.add_argument("--sequences", type=int, default=256, metavar="N", help="sequences at most (default: 256)")
    parser.add_argument("--length", type=int, default=512, metavar="T", help="tokens a sequence (default: 512)")


def check(args: argparse.Namespace) -> None:
    """FileNotFoundError for a text that is not there, before any rank starts."""
    if args.text is not None:
        model_arguments.check_text(args.text)


def run(args: argparse.Namespace) -> None:
    context = local_ranks.context_of(args)
    weights, tokenizer = model_arguments.load(args, context)
    text = context.together(lambda: model_arguments.read_text(args.text) if args.text else demo_text()[0])
    what = str(args.text or "the built-in text")
    sequences = context.together(lambda: text_windows(tokenizer, text, args.sequences, args.length, AT_LEAST, what))
    context.agree_same(text_digest(text), "the calibration text")
    with output.progress_bar("calibrating (sequences)", context) as progress:
        calibration = calibrate(weights, sequences, text_digest(text), progress)
    context.together(lambda: calibration.save(args.out) if context.is_first else None)
    rows = [
        {"sync_points": len(calibration.sync_points), "sequences": calibration.sequences, "length": calibration.length,
         "nbytes": args.out.stat().st_size if context.is_first else 0}
    ]  # fmt: skip
    output.console(context).print(
        f"wrote {args.out}: {len(calibration.sync_points)} sync points, {calibration.sequences} sequences of "
        f"{calibration.length} tokens, TP={context.size}"
    )
    facts = output.conditions(
        context, model=str(args.model), dtype=model_arguments.dtype_name(weights), text=what,
        fingerprint=weights.fingerprint,
    )  # fmt: skip
    output.write_json(args.json, context, facts, rows)
    context.close()
