"""`report`: what schemes do to one model, as a page to decide from, and the numbers behind it."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from rich.table import Table

from lowbit_tools import local_ranks, model_arguments, output
from lowbit_tools.demo_text import demo_text
from lowbit_tools.report_page import report_page
from megatron_lowbit.calibration.scheme_file import TunedScheme
from megatron_lowbit.calibration_run import text_digest
from megatron_lowbit.comm.presets import PRESETS
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.files import replacing
from megatron_lowbit.quality_report import PARTS, Report, ReportSettings
from megatron_lowbit.windows import text_windows

NAME = "report"
HELP = "Write a page that says, for one model, what each scheme costs in quality: a certificate to decide from."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments.add_arguments(parser)
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: prose of Python's own manual)")
    parser.add_argument(
        "--schemes", required=True, help="comma-separated, as for eval; name bf16 too, to see 16 bits beside them"
    )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="from `megatron-lowbit calibrate`")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page (default: report.html)"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"what to measure (default: {','.join(PARTS)})")
    parser.add_argument("--windows", type=int, default=32, metavar="N", help="windows at most (default: 32)")
    parser.add_argument("--length", type=int, default=512, metavar="T", help="tokens a window (default: 512)")
    parser.add_argument(
        "--lengths", default="128,2048", metavar="T,T",
        help="other lengths to evaluate, where the model has room (default: 128,2048)",
    )  # fmt: skip
    parser.add_argument("--decode-batches", default="1,32", metavar="B,B", help="sequences at once (default: 1,32)")
    parser.add_argument("--decode-positions", type=int, default=128, metavar="N", help="decoded in all (default: 128)")
    parser.add_argument("--layer-windows", type=int, default=2, metavar="N", help="for errors by layer (default: 2)")
    parser.add_argument("--prompts", type=int, default=50, metavar="N", help="greedy texts (default: 50)")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N", help="tokens of each (default: 128)")


def check(args: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError for arguments that make no sense, before any rank starts."""
    model_arguments.check_schemes(args.schemes)
    _settings(args)
    if args.text is not None:
        model_arguments.check_text(args.text)
    if not args.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: there is no folder {args.out.absolute().parent}; make it first")


def run(args: argparse.Namespace) -> None:
    context = local_ranks.context_of(args)
    schemes = model_arguments.load_schemes(args.schemes, context)
    settings = _settings(args)
    weights, tokenizer = model_arguments.load(args, context)
    calibration = model_arguments.load_calibration(args.calibration, context)
    text = context.together(lambda: model_arguments.read_text(args.text) if args.text else demo_text()[1])
    what = str(args.text or "the built-in text")
    context.agree_same(text_digest(text), "the evaluation text")

    def windows(count: int, length: int) -> list[list[int]]:
        return context.together(lambda: text_windows(tokenizer, text, count, length, 1, what))

    report = Report(
        weights, schemes, calibration, windows, {*tokenizer.eos_ids, *weights.config.eos_token_ids}, settings,
        functools.partial(output.progress_bar, context=context), args.backend,
    )  # fmt: skip
    rows = report.rows()
    facts = output.conditions(
        context, model=args.model.resolve().name, fingerprint=weights.fingerprint,
        dtype=model_arguments.dtype_name(weights), hidden=weights.config.hidden_size, layers=weights.config.num_layers,
        text=args.text.name if args.text else what, text_sha256=text_digest(text),
        schemes=[_spelled_out(scheme) for scheme in schemes],
        windows=len(windows(settings.windows, settings.length)), length=settings.length, parts=sorted(settings.parts),
        layer_windows=settings.layer_windows, prompt_tokens=settings.prompt_tokens,
        calibration_sequences=calibration.sequences if calibration else None,
        calibration_length=calibration.length if calibration else None,
        calibration_text_sha256=calibration.text_sha256 if calibration else None,
    )  # fmt: skip
    context.together(lambda: _write(args.out, report_page(facts, rows)) if context.is_first else None)
    screen = output.console(context)
    verdicts = [row for row in rows if row["part"] == "verdict"]
    if verdicts:
        screen.print(_table(verdicts))
    screen.print(f"page: {args.out}")
    output.write_json(args.json, context, facts, rows)
    context.close()


def _spelled_out(scheme: CommScheme | TunedScheme) -> str:
    """With what a preset's name stands for: presets may change, pages are kept."""
    return f"{scheme.name} = {PRESETS[scheme.name]}" if scheme.name in PRESETS else scheme.name


def _settings(args: argparse.Namespace) -> ReportSettings:
    for flag in ("windows", "decode_positions", "layer_windows", "prompts", "new_tokens"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} is {getattr(args, flag)}; it must be at least 1")
    if args.length < 3:
        raise ValueError(f"--length is {args.length}; it must be at least 3")
    return ReportSettings(
        windows=args.windows,
        length=args.length,
        lengths=_numbers("--lengths", args.lengths, 3),
        decode_batches=_numbers("--decode-batches", args.decode_batches, 1),
        decode_positions=args.decode_positions,
        layer_windows=args.layer_windows,
        prompts=args.prompts,
        new_tokens=args.new_tokens,
        parts=frozenset(part.strip() for part in args.parts.split(",")),
    )


def _numbers(flag: str, text: str, least: int) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise ValueError(f"{flag} is {text!r}; give whole numbers of at least {least}, separated by commas")
    return tuple(int(word) for word in words)


def _write(path: Path, page: str) -> None:
    with replacing(path) as beside:
        beside.write_text(page, encoding="utf-8")


def _table(verdicts: list[dict[str, str]]) -> Table:
    table = Table(title="Verdicts", title_justify="left", box=None, padding=(0, 1, 1, 1))
    for heading in ("scheme", "grade", "in words"):
        table.add_column(heading, overflow="fold")
    for row in verdicts:
        table.add_row(row["scheme"], row["grade"], row["text"])
    return table
