"""`reshard`: a converted checkpoint for another number of ranks."""

from __future__ import annotations

import argparse
from pathlib import Path

from checkpoints_conv.reshard import reshard
from lowbit_tools import local_ranks, output
from lowbit_tools.commands.convert import report

NAME = "reshard"
HELP = "Cut a converted checkpoint for another number of ranks, bit for bit, without its original."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help="converted checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to create")
    parser.add_argument("--tp", type=int, required=True, metavar="M", help="tensor-parallel ranks, one file each")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is a converted checkpoint")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and rows as JSON")


check = local_ranks.check_nothing


def run(args: argparse.Namespace) -> None:
    with output.byte_progress_bar("resharding") as progress:
        summary = reshard(args.source, args.out, args.tp, progress, args.overwrite)
    report(summary, args.source, args.json)
