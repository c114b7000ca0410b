"""megatron-lowbit: the console script. Parses arguments, starts local ranks where asked, turns errors into one line."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

from lowbit_tools import local_ranks
from lowbit_tools.commands import bench, calibrate, convert, demo, evaluate, generate
from megatron_lowbit.parallel import RankError

COMMANDS = (convert, calibrate, generate, evaluate, bench, demo)
USER_ERROR = 2
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; tests freeze its flags."""
    parser = argparse.ArgumentParser(
        prog="megatron-lowbit",
        description="Tensor-parallel LLM inference whose all-reduces travel at about 4 bits a value.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.NAME, help=command.HELP, description=command.HELP)
        subparser.add_argument("--verbose", action="store_true", help="log what was chosen (scheme, codec) and why")
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the user can fix it (one line says how), 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = build_parser().parse_args(words)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    try:
        ranks = local_ranks.wanted(args)
        if ranks > 1 and not local_ranks.under_torchrun():
            return local_ranks.launch(ranks, words)
        args.run(args)
    except RankError as error:  # the same on every rank: said once
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"megatron-lowbit: error: {error}", file=sys.stderr)
        return USER_ERROR
    except (ValueError, FileNotFoundError, FileExistsError, PermissionError) as error:
        rank = os.environ.get("RANK")
        print(f"megatron-lowbit: error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("megatron-lowbit: interrupted; nothing half-written was left behind", file=sys.stderr)
        return INTERRUPTED
    return 0
