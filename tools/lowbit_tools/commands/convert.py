"""`convert`: any readable checkpoint to one safetensors file a rank."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from checkpoints_conv.convert import ConversionSummary, convert
from checkpoints_conv.dry_run import dry_run
from checkpoints_conv.source import open_source
from lowbit_tools import output
from lowbit_tools.model_config import read_config
from megatron_lowbit.checkpoint.open import is_gguf
from megatron_lowbit.config import ModelConfig
from megatron_lowbit.parallel import ParallelContext

NAME = "convert"
HELP = "Convert a Hugging Face directory or a GGUF file to a tensor-parallel checkpoint."
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "auto": None}
COLUMNS = {
    "rank": lambda row: str(row["rank"]),
    "file": lambda row: str(row["file"]),
    "tensors": lambda row: str(row["tensors"]),
    "MB": lambda row: f"{row['nbytes'] / 1e6:.1f}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help="Hugging Face directory, GGUF file or our checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", help="directory to create (none with --dry-run)")
    parser.add_argument("--tp", type=int, required=True, metavar="N", help="tensor-parallel ranks, one file each")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bf16", help="stored weights (default: bf16; auto: as in SRC)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is a converted checkpoint")
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be written; a config.json alone suffices as SRC"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and rows as JSON")


def check(args: argparse.Namespace) -> None:
    if args.dry_run != (args.out is None):
        raise ValueError("give OUT, the directory to create, or --dry-run and no OUT")
    if args.dry_run and args.dtype == "auto":
        raise ValueError("--dtype is auto, but a dry run sees no weights; give bf16, fp16 or fp32")


def run(args: argparse.Namespace) -> None:
    if args.dry_run:
        _plan(args)
        return
    with output.byte_progress_bar("converting") as progress:
        summary = convert(args.source, args.out, args.tp, DTYPES[args.dtype], progress, args.overwrite)
    report(summary, args.source, args.json)


def report(summary: ConversionSummary, source: Path, json_path: Path | None) -> None:
    """The table of a conversion, and its rows as JSON."""
    rows = [asdict(rank) for rank in summary.ranks]
    caption = f"from {source}, {summary.dtype}, verified sums in manifest.json"
    console = output.console()
    console.print(output.table(str(summary.out), rows, COLUMNS, caption))
    for note in summary.notes:
        console.print(note, soft_wrap=True)
    context = ParallelContext.single()
    facts = output.conditions(
        context, source=str(source), out=str(summary.out), dtype=summary.dtype, ranks=len(rows), notes=summary.notes
    )
    output.write_json(json_path, context, facts, rows)


def _plan(args: argparse.Namespace) -> None:
    dtype = DTYPES[args.dtype]
    assert dtype is not None
    plan = dry_run(_config(args.source), args.tp, dtype)
    rows: list[dict[str, Any]] = [asdict(rank) for rank in plan.ranks]
    total = sum(rank.nbytes for rank in plan.ranks)
    console = output.console()
    console.print(output.table(f"{args.source}, TP={args.tp}", rows, COLUMNS, "nothing was written"))
    console.print(f"{plan.parameters:,} parameters, {args.dtype}; {total / 1e9:.2f} GB in all", soft_wrap=True)
    context = ParallelContext.single()
    facts = output.conditions(
        context, source=str(args.source), dtype=args.dtype, ranks=args.tp, parameters=plan.parameters, nbytes=total
    )
    output.write_json(args.json, context, facts, [asdict(tensor) for tensor in plan.tensors])


def _config(source: Path) -> ModelConfig:
    if source.is_file() and is_gguf(source):
        return open_source(source).config
    return read_config(source)
