"""`export`: any readable checkpoint to a Hugging Face directory."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from checkpoints_conv.export import export
from lowbit_tools import output
from lowbit_tools.commands.convert import DTYPES
from lowbit_tools.units import nbytes
from megatron_lowbit.parallel import ParallelContext

NAME = "export"
HELP = "Write a checkpoint as a Hugging Face directory that transformers loads, bit for bit."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="CKPT", help="converted checkpoint, or anything convert takes")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="directory to create")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default: 5GB)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="auto", help="weights (default: as they are stored)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and rows as JSON")


def check(args: argparse.Namespace) -> None:
    nbytes(args.max_shard_size, "--max-shard-size")


def run(args: argparse.Namespace) -> None:
    limit = nbytes(args.max_shard_size, "--max-shard-size")
    with output.byte_progress_bar("exporting") as progress:
        summary = export(args.source, args.out, limit, DTYPES[args.dtype], progress)
    rows = [asdict(file) for file in summary.files]
    columns = {
        "file": lambda row: str(row["file"]),
        "tensors": lambda row: str(row["tensors"]),
        "MB": lambda row: f"{row['nbytes'] / 1e6:.1f}",
    }
    console = output.console()
    console.print(output.table(str(args.out), rows, columns, f"from {args.source}, {summary.dtype}"))
    for note in (f"with {', '.join(summary.other_files)}", *summary.notes):
        console.print(note, soft_wrap=True)
    context = ParallelContext.single()
    facts = output.conditions(context, source=str(args.source), out=str(args.out), dtype=summary.dtype)
    output.write_json(args.json, context, facts, rows)
