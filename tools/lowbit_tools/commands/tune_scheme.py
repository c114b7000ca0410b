"""`tune-scheme`: formats for each sync point and stage under a budget of bits, or under a KL limit, as one file."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from lowbit_tools import local_ranks, model_arguments, output
from lowbit_tools.commands.evaluate import quality_table
from lowbit_tools.demo_text import demo_text
from megatron_lowbit.calibration.scheme_file import check_path
from megatron_lowbit.calibration_run import calibrate, text_digest
from megatron_lowbit.scheme_tuning import Goal, SiteRow, Tuned, tune_scheme
from megatron_lowbit.windows import text_windows

NAME = "tune-scheme"
HELP = "Spend a budget of bits where this model needs them; write a scheme file for generate, eval and bench-model."
#: Of the text's windows, one in so many is kept for the search and one for the proof.
SEARCH, UNSEEN = 4, 8
AT_LEAST = SEARCH + UNSEEN + 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments.add_arguments(parser)
    parser.add_argument("out", type=Path, metavar="OUT.safetensors", help="scheme file to write")
    parser.add_argument(
        "--budget-bits", type=float, metavar="BITS",
        help="wire bits a value, in the mean over all sync points and both stages; the least KL within them",
    )  # fmt: skip
    parser.add_argument("--max-kl", type=float, metavar="KL", help="instead: the fewest bits with a KL below, in nats")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="from `megatron-lowbit calibrate` (default: calibrates first)"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: prose of Python's own manual)")
    parser.add_argument(
        "--sequences", type=int, default=64, metavar="N", help="sequences to calibrate with at most (default: 64)"
    )
    parser.add_argument("--length", type=int, default=512, metavar="T", help="tokens a sequence (default: 512)")
    parser.add_argument(
        "--fast", action="store_true",
        help="for busy processors: no trellis-coded values, which take encoders several times as long as code books",
    )  # fmt: skip
    parser.add_argument(
        "--portable", action="store_true", help="a scheme of partial sums alone: no predictor, no loop over depth"
    )


def check(args: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError for arguments that make no sense, before any rank starts."""
    check_path(args.out)
    _goal(args)
    if args.text is not None:
        model_arguments.check_text(args.text)


def _goal(args: argparse.Namespace) -> Goal:
    if (args.budget_bits is None) == (args.max_kl is None):
        raise ValueError("give either --budget-bits BITS or --max-kl KL: the one is spent, the other is kept to")
    return Goal(args.budget_bits, args.max_kl)


def run(args: argparse.Namespace) -> None:
    context = local_ranks.context_of(args)
    weights, tokenizer = model_arguments.load(args, context)
    text = context.together(lambda: model_arguments.read_text(args.text) if args.text else demo_text()[0])
    what = str(args.text or "the built-in text")
    digest = text_digest(text)
    count = args.sequences + SEARCH + UNSEEN
    windows = context.together(lambda: text_windows(tokenizer, text, count, args.length, AT_LEAST, what))
    context.agree_same(digest, "the text")
    sequences, search, unseen = split(windows)
    calibration = model_arguments.load_calibration(args.calibration, context)
    if calibration is None:
        with output.progress_bar("calibrating (sequences)", context) as progress:
            calibration = calibrate(weights, sequences, digest, progress)
    tuned = tune_scheme(
        weights, calibration, search, unseen, _goal(args), functools.partial(output.progress_bar, context=context),
        args.portable, args.fast, args.backend, args.out.name, args.model.name, Path(what).name, digest,
    )  # fmt: skip
    context.together(lambda: tuned.scheme.save(args.out) if context.is_first else None)
    facts = output.conditions(
        context, model=str(args.model), dtype=model_arguments.dtype_name(weights), text=what, windows=len(unseen),
        length=args.length, path="prefill", batch=None, hidden=weights.config.hidden_size,
        calibration_sequences=calibration.sequences, origin=asdict(tuned.scheme.origin), base=tuned.scheme.base,
        uniform=tuned.is_uniform, expected_kl=tuned.expected_kl, evaluated=[asdict(row) for row in tuned.rows],
    )  # fmt: skip
    screen = output.console(context)
    screen.print(points_table(tuned))
    screen.print(quality_table([asdict(row) for row in tuned.rows], facts))
    if tuned.is_uniform:
        screen.print("formats of their own were not better at any sync point: the scheme has the same everywhere")
    origin = tuned.scheme.origin
    screen.print(
        f"wrote {args.out}: {origin.wire_bits:.3f} bits a value, KL {origin.kl:.4f} on text the search did not see "
        f"({origin.uniform}: {origin.uniform_kl:.4f}); use it with --scheme {args.out}"
    )
    output.write_json(args.json, context, facts, [asdict(point) for point in tuned.points])
    context.close()


def split(windows: Sequence[list[int]]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """(to calibrate, to search, to prove with): evenly mixed, so that all three are like the whole text."""
    kept = len(windows) // (SEARCH + UNSEEN)
    special = {kept * number + kept // 2: number for number in range(SEARCH + UNSEEN)}
    every = (SEARCH + UNSEEN) // SEARCH
    search = [windows[at] for at, number in special.items() if number % every == 0]
    unseen = [windows[at] for at, number in special.items() if number % every]
    return [window for at, window in enumerate(windows) if at not in special], search, unseen


def points_table(tuned: Tuned) -> Table:
    """One row for each kind of block, pair of formats and run of layers."""
    groups: dict[tuple[str, str, str], list[SiteRow]] = {}
    for point in tuned.points:
        kind = re.sub(r"^layers\.\d+\.", "", point.name)
        groups.setdefault((kind, point.reduce_format, point.gather_format), []).append(point)
    rows: list[dict[str, Any]] = []
    for (kind, reduce_format, gather_format), points in sorted(groups.items()):
        bits = sum(point.reduce_bits + point.gather_bits for point in points) / 2 / len(points)
        rows.append(
            {"kind": kind, "layers": _runs([_layer(point.name) for point in points]), "reduce": reduce_format,
             "gather": gather_format, "bits": bits, "share": sum(point.error_share for point in points)}
        )  # fmt: skip
    columns = {
        "sync point": lambda row: row["kind"],
        "layers": lambda row: row["layers"],
        "reduce": lambda row: row["reduce"],
        "gather": lambda row: row["gather"],
        "bits": lambda row: f"{row['bits']:.2f}",
        "share of KL": lambda row: f"{100 * row['share']:.1f} %",
    }
    caption = f"Shares are expected ones; the whole: {tuned.expected_kl:.4f} nats a token"
    return output.table("Formats chosen", rows, columns, caption)


def _layer(name: str) -> int:
    found = re.match(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else 0


def _runs(layers: Sequence[int]) -> str:
    """`0-3,7` of 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
