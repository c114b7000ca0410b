"""`convert`: any readable checkpoint to one safetensors file a rank."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from checkpoints_conv.convert import convert
from lowbit_tools import local_ranks, output
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.weights import DTYPES

NAME = "convert"
HELP = "Convert a Hugging Face directory or a GGUF file to a tensor-parallel checkpoint."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help="Hugging Face directory, GGUF file or our checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to create")
    parser.add_argument("--tp", type=int, required=True, metavar="N", help="tensor-parallel ranks, one file each")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="stored weights (default: bf16)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is a converted checkpoint")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and rows as JSON")


check = local_ranks.check_nothing


def run(args: argparse.Namespace) -> None:
    context = ParallelContext.single()
    with output.progress_bar("converting (bytes)") as progress:
        summary = convert(
            args.source, args.out, args.tp, DTYPES[args.dtype], progress=progress, overwrite=args.overwrite
        )
    rows = [asdict(rank) for rank in summary.ranks]
    facts = output.conditions(context, source=str(args.source), out=str(args.out), dtype=args.dtype, ranks=args.tp)
    columns = {
        "rank": lambda row: str(row["rank"]),
        "file": lambda row: str(row["file"]),
        "tensors": lambda row: str(row["tensors"]),
        "MB": lambda row: f"{row['nbytes'] / 1e6:.1f}",
    }
    output.console().print(
        output.table(f"{args.out}", rows, columns, f"from {args.source}, {args.dtype}, verified sums in manifest.json")
    )
    output.write_json(args.json, context, facts, rows)
