"""Local ranks: `--tp N` starts N processes on this host through torch's own launcher, unless torchrun did already."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_lowbit.parallel import ParallelContext

# their --tp is a property of what they write; they are one process
WRITE_FOR_RANKS = ("convert", "reshard")

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser, virtual: bool) -> None:
    """`--tp`, `--device` and, where virtual ranks make sense, `--virtual-tp`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--tp",
        type=int,
        metavar="N",
        help="tensor-parallel ranks, started here unless torchrun started them (default 1)",
    )
    if virtual:
        group.add_argument(
            "--virtual-tp", type=int, metavar="N", help="play N ranks in one process: same codecs, no network"
        )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")


def wanted(args: argparse.Namespace) -> int:
    """How many ranks the arguments ask to start; ValueError for a count that is none, or unlike torchrun's."""
    tp, virtual = getattr(args, "tp", None), getattr(args, "virtual_tp", None)
    for flag, count in (("--tp", tp), ("--virtual-tp", virtual)):
        if count is not None and count < 1:
            raise ValueError(f"{flag} is {count}; it must be at least 1")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if under_torchrun() and args.command not in WRITE_FOR_RANKS:
        if virtual is not None and world > 1:
            raise ValueError(f"--virtual-tp {virtual} runs in one process, torchrun started {world}; start it alone")
        if tp is not None and tp != world:
            raise ValueError(f"--tp {tp} differs from the {world} ranks torchrun started; leave --tp out")
    return 1 if args.command in WRITE_FOR_RANKS else tp or 1


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ or "WORLD_SIZE" in os.environ


def check_nothing(args: argparse.Namespace) -> None:
    """For commands whose arguments need no check beyond the parser's."""


def context_of(args: argparse.Namespace) -> ParallelContext:
    """The parallel context the arguments and the environment describe.

    Raises RankError on all ranks where one was started with other arguments (paths may differ between hosts).
    """
    virtual = getattr(args, "virtual_tp", None)
    if virtual is not None:
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return ParallelContext.virtual_ranks(virtual, device)
    context = ParallelContext.from_environment(args.device)
    comparable = {name: value for name, value in vars(args).items() if not (isinstance(value, Path) or callable(value))}
    context.agree_same(comparable, "the command line")
    return context


def launch(ranks: int, words: Sequence[str]) -> int:
    """Runs the same command line on `ranks` local processes; the exit code of the first one that failed, or 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # a failing rank has already said why in one line; the launcher's own report would bury it
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "lowbit_tools", *words)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return next((code for code in codes if code > 0), 1)
    except SignalException:  # the ranks got it too, and the first of them says so
        return INTERRUPTED
    return 0
