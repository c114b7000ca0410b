"""Flags and steps that commands running a model share: MODEL, --dtype, --text, loading with a bar."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from lowbit_tools import local_ranks
from lowbit_tools.output import progress_bar
from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.calibration.scheme_file import TunedScheme, is_scheme_file
from megatron_lowbit.comm.policy import Policy, shared_policy
from megatron_lowbit.comm.schemes import CommScheme, parse_scheme
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.tokenizer import Tokenizer
from megatron_lowbit.weights import DTYPES, ModelWeights, load_weights


def add_arguments(parser: argparse.ArgumentParser, virtual: bool = True) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="converted checkpoint or Hugging Face directory")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="weights and activations (default: bf16, fp32 for a checkpoint in fp32)"
    )
    local_ranks.add_arguments(parser, virtual)
    parser.add_argument(
        "--backend", default="auto", choices=("auto", "torch", "cpu", "triton"),
        help="codec implementation; all give the same bits (default: the fastest that runs)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and rows as JSON")


def load(args: argparse.Namespace, context: ParallelContext) -> tuple[ModelWeights, Tokenizer]:
    """Weights of this rank and the tokenizer; a failure on any rank is raised on all."""
    tokenizer = context.together(functools.partial(Tokenizer.from_directory, args.model))
    dtype = None if args.dtype is None else DTYPES[args.dtype]
    with progress_bar(f"loading {args.model.name}", context) as progress:
        return load_weights(args.model, context, dtype, progress), tokenizer


def load_calibration(path: Path | None, context: ParallelContext) -> CommCalibration | None:
    if path is None:
        return None
    return context.together(functools.partial(CommCalibration.load, path))


def add_policy_argument(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--policy", default="auto", metavar="auto|none|FILE",
        help=f"{what} (default: auto; none: the scheme at every size; FILE: from `megatron-lowbit tune`)",
    )  # fmt: skip


def load_policy(text: str, context: ParallelContext) -> Policy | None:
    """The policy that `--policy` names, the same on all ranks; ValueError where a file is not one."""
    return shared_policy(context, None if text == "none" else text)


def dtype_name(weights: ModelWeights) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == weights.dtype)


def parse_schemes(text: str) -> list[CommScheme]:
    """Schemes of a comma-separated list; ValueError for an unknown or repeated one."""
    return [parse_scheme(name) for name in _names(text)]


def check_schemes(text: str) -> None:
    """Of a list that may have scheme files in it: ValueError or FileNotFoundError, before any rank starts."""
    for name in _names(text):
        if is_scheme_file(name):
            TunedScheme.load(Path(name))
        else:
            parse_scheme(name)


def load_schemes(text: str, context: ParallelContext) -> list[CommScheme | TunedScheme]:
    """Schemes of a comma-separated list of names and scheme files; a failure on any rank is raised on all."""
    return context.together(
        lambda: [TunedScheme.load(Path(name)) if is_scheme_file(name) else parse_scheme(name) for name in _names(text)]
    )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"--schemes names {', '.join(sorted(repeated))} twice; name each scheme once")
    return names


def check_text(path: Path) -> None:
    """FileNotFoundError where there is no such text file."""
    if not path.is_file():
        raise FileNotFoundError(f"text file {path} not found; give a UTF-8 text file")


def read_text(path: Path) -> str:
    """A UTF-8 text file; ValueError where it is something else."""
    check_text(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first"
        ) from error
