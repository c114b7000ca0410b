"""megatron-lowbit: the console script. Parses arguments, starts local ranks where asked, turns errors into one line."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from lowbit_tools import local_ranks
from lowbit_tools.commands import (
    bench,
    bench_model,
    calibrate,
    convert,
    demo,
    eval_tasks,
    evaluate,
    export,
    generate,
    plan,
    report,
    reshard,
    tune,
    tune_scheme,
    verify,
)
from megatron_lowbit.parallel import CommunicationError, RankError

COMMANDS = (
    convert, reshard, export, verify, calibrate, tune_scheme, generate, evaluate, eval_tasks, report, bench,
    bench_model, tune, plan, demo,
)  # fmt: skip
USER_ERROR = 2


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage: `--help` is there for that."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; tests freeze its flags."""
    parser = OneLineParser(
        prog="megatron-lowbit",
        description="Tensor-parallel LLM inference whose all-reduces travel at about 4 bits a value.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.NAME, help=command.HELP, description=command.HELP, allow_abbrev=False)
        subparser.add_argument("--verbose", action="store_true", help="log what was chosen (scheme, codec) and why")
        command.add_arguments(subparser)
        subparser.set_defaults(check=command.check, run=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the user can fix it (one line says how), 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = build_parser().parse_args(words)
    quiet = logging.WARNING if _is_first() else logging.ERROR  # all ranks choose alike: one says it
    logging.basicConfig(level=logging.INFO if args.verbose else quiet, format="%(message)s")
    try:
        args.check(args)
        ranks = local_ranks.wanted(args)
        if ranks > 1 and not local_ranks.under_torchrun():
            return local_ranks.launch(ranks, words)
        args.run(args)
    except (RankError, CommunicationError, ValueError, OSError) as error:
        # a RankError is the same on every rank and said once; anything else may be known to this rank alone
        if not isinstance(error, RankError) or _is_first():
            print(f"megatron-lowbit: error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if _is_first():
            print("megatron-lowbit: interrupted; nothing half-written was left behind", file=sys.stderr)
        return local_ranks.INTERRUPTED
    return 0


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"
