"""`plan`: modelled time to first token and time per token, at 16 bits and under a scheme. It measures nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lowbit_tools import output, units
from lowbit_tools.commands.bench_model import prompt_lengths
from lowbit_tools.plan_collectives import Link
from lowbit_tools.plan_model import Machine, Prediction, predict
from lowbit_tools.plan_shapes import read_shape
from lowbit_tools.plan_tables import ASSUMPTIONS, table_predictions
from lowbit_tools.plan_validation import Rates, largest_errors, read_measured, validate
from megatron_lowbit.comm.policy import Policy, default_policy, load_policy
from megatron_lowbit.comm.schemes import CommScheme, parse_scheme
from megatron_lowbit.parallel import ParallelContext

NAME = "plan"
HELP = "Predict from a model what a scheme gains for a model, ranks and links: no ranks are started."
SCHEME, PROMPTS, BATCH, POLICY = "int4-outlier", "512,2048", 1, "auto"

Columns = dict[str, Callable[[Mapping[str, Any]], str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", type=Path, metavar="CONFIG", help="any dense model's config.json, or the folder that holds it"
    )
    what.add_argument("--table", action="store_true", help="four known models on eight GPUs, three kinds of links")
    what.add_argument(
        "--validate", type=Path, metavar="FILE", help="predicted beside measured: rows of `bench-model --json`"
    )
    # not `tp`: that would start ranks
    parser.add_argument("--tp", type=int, dest="ranks", metavar="N", help="tensor-parallel ranks")
    parser.add_argument(
        "--link", metavar="RATE[,LATENCY]",
        help="of each rank, each way: 25gbit,50us or 32GB/s,10us (default latency: 0)",
    )  # fmt: skip
    parser.add_argument("--flops", metavar="RATE", help="operations a second of a rank that are reached: 150T")
    parser.add_argument("--memory-bandwidth", metavar="RATE", help="of a rank, reached: 1.5TB/s")
    parser.add_argument(
        "--codec-bandwidth", metavar="RATE",
        help="bytes a second that encoding and decoding touch (default: half the memory bandwidth)",
    )  # fmt: skip
    parser.add_argument(
        "--transport", choices=("tcp", "process-group"),
        help="tcp: pieces of a message are coded while others travel (default); process-group (NCCL, gloo): nothing is",
    )  # fmt: skip
    parser.add_argument("--scheme", help=f"default: {SCHEME}")
    parser.add_argument(
        "--policy", metavar="auto|none|FILE",
        help="which collective for which size, at 16 bits too (default: auto; none: the scheme's own; FILE: of `tune`)",
    )  # fmt: skip
    parser.add_argument("--prompt-tokens", help=f"comma-separated (default: {PROMPTS})")
    parser.add_argument("--batch", type=int, metavar="N", help=f"sequences side by side (default: {BATCH})")
    parser.add_argument(
        "--overhead", metavar="TIME", help="of a pass, which more ranks do not shorten: 2ms (default: 0)"
    )
    parser.add_argument(
        "--torch-latency", metavar="TIME",
        help="for --validate: of a small all-reduce of torch's (default: the link's latency for each of its steps)",
    )  # fmt: skip
    parser.add_argument(
        "--alone", type=Path, metavar="FILE", help="for --validate: rows of one rank, which give the machine's rates"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and rows as JSON")


#: flags that a mode needs, and those that it can use beside them; the rest would be skipped silently
_NEEDED = {"model": ("ranks", "link", "flops", "memory_bandwidth"), "table": (), "validate": ("link",)}
_USED = {
    "model": ("codec_bandwidth", "overhead", "transport", "scheme", "policy", "prompt_tokens", "batch"),
    "table": ("scheme", "prompt_tokens", "batch"),
    "validate": ("flops", "memory_bandwidth", "codec_bandwidth", "torch_latency", "alone"),
}


def check(args: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError for arguments that make no sense or have no use."""
    mode = _mode(args)
    others = [name for names in (*_NEEDED.values(), *_USED.values()) for name in names]
    given = [name for name in dict.fromkeys(others) if getattr(args, name) is not None]
    missing = [_flag(name) for name in _NEEDED[mode] if name not in given]
    useless = [_flag(name) for name in given if name not in _NEEDED[mode] + _USED[mode]]
    if missing:
        raise ValueError(f"--{mode} needs {', '.join(missing)} too")
    if useless:
        raise ValueError(f"--{mode} has no use for {', '.join(useless)}; leave it out")
    prompt_lengths(args.prompt_tokens or PROMPTS)
    parse_scheme(args.scheme or SCHEME)
    _rates(args)
    for flag, value in (("--tp", args.ranks), ("--batch", args.batch)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} is {value}; it must be at least 1")
    if args.link is not None:
        parse_link(args.link)
    for path in (args.validate, args.alone):
        if path is not None:
            read_measured(path)


def parse_link(text: str, overlaps: bool = True) -> Link:
    """`25gbit,50us`: bytes a second and seconds. ValueError for anything else."""
    rate, comma, latency = text.partition(",")
    return Link(
        units.bits_per_s(rate, "--link") / 8, units.seconds(latency, "--link latency") if comma else 0.0, overlaps
    )


def run(args: argparse.Namespace) -> None:
    mode, context = _mode(args), ParallelContext.single()
    scheme, lengths = parse_scheme(args.scheme or SCHEME), prompt_lengths(args.prompt_tokens or PROMPTS)
    screen = output.console()
    facts = output.conditions(context, modelled=True, mode=mode)
    if mode == "validate":
        rows, tables, more = _validated(args)
    elif mode == "table":
        found = table_predictions(scheme, lengths, args.batch or BATCH)
        rows = [prediction.row() | {"link": fabric.name} for fabric, prediction in found]
        tables = _tables(rows, scheme, ASSUMPTIONS, ("model", "link"))
        more = {"assumptions": ASSUMPTIONS, "scheme": scheme.name}
    else:
        predictions, more = _predicted(args, scheme, lengths)
        rows = [prediction.row() for prediction in predictions]
        caption = (
            f"{predictions[0].model}, TP={args.ranks}, batch {args.batch or BATCH}; given: link {args.link}, "
            f"{args.flops} operations/s, memory {args.memory_bandwidth}, codec "
            f"{more['codec_nbytes_per_s'] / 1e9:g} GB/s, transport {more['transport']}, policy {more['policy']}."
        )
        tables = _tables(rows, scheme, caption, ())
    for table in tables:
        screen.print(table)
    output.write_json(args.json, context, facts | more, rows)


def _mode(args: argparse.Namespace) -> str:
    return "model" if args.model is not None else "validate" if args.validate is not None else "table"


def _flag(name: str) -> str:
    return "--tp" if name == "ranks" else "--" + name.replace("_", "-")


def _rates(args: argparse.Namespace) -> Rates:
    def read(text: str | None, reader: Callable[[str, str], float], flag: str) -> float | None:
        return None if text is None else reader(text, flag)

    return Rates(
        read(args.flops, units.flops, "--flops"),
        read(args.memory_bandwidth, units.nbytes_per_s, "--memory-bandwidth"),
        read(args.codec_bandwidth, units.nbytes_per_s, "--codec-bandwidth"),
        read(args.torch_latency, units.seconds, "--torch-latency"),
    )


def _predicted(
    args: argparse.Namespace, scheme: CommScheme, lengths: Sequence[int]
) -> tuple[list[Prediction], dict[str, Any]]:
    shape, rates, transport = read_shape(args.model), _rates(args), args.transport or "tcp"
    assert rates.flops is not None and rates.memory_nbytes_per_s is not None
    codec = rates.codec_nbytes_per_s or rates.memory_nbytes_per_s / 2
    overhead = units.seconds(args.overhead, "--overhead") if args.overhead else 0.0
    machine = Machine(
        rates.flops, rates.memory_nbytes_per_s, codec, parse_link(args.link, transport == "tcp"), overhead
    )
    policy = _policy(args.policy or POLICY, args.ranks)
    found = [predict(shape, args.ranks, machine, scheme, policy, length, args.batch or BATCH) for length in lengths]
    return found, {
        "model": str(args.model),
        "scheme": scheme.name,
        "tp": args.ranks,
        "link": args.link,
        "flops": rates.flops,
        "memory_nbytes_per_s": rates.memory_nbytes_per_s,
        "codec_nbytes_per_s": codec,
        "overhead_s": overhead,
        "transport": transport,
        "policy": args.policy or POLICY,
    }


def _policy(text: str, ranks: int) -> Policy | None:
    if text == "none" or ranks == 1:
        return None
    return default_policy(ranks) if text == "auto" else load_policy(Path(text))


def _validated(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Table], dict[str, Any]]:
    measured = read_measured(args.validate)
    alone = None if args.alone is None else read_measured(args.alone)
    link = parse_link(args.link, bool(measured.conditions["overlaps"]))
    rows = validate(measured, _rates(args), alone, link)
    worst = largest_errors(rows)
    source = "given" if alone is None else f"reached by one rank alone ({alone.path})"
    columns: Columns = {
        "prompt": lambda row: f"{row['prompt_tokens']:,}",
        "scheme": lambda row: row["scheme"],
        "first token, measured ms": lambda row: f"{1e3 * row['ttft_measured_s']:,.1f}",
        "MODELLED ms": lambda row: f"{1e3 * row['ttft_modelled_s']:,.1f}",
        "error": lambda row: f"{100 * row['ttft_error']:+.0f} %",
        "token, measured ms": lambda row: f"{1e3 * row['step_measured_s']:,.1f}",
        "MODELLED ms ": lambda row: f"{1e3 * row['step_modelled_s']:,.1f}",
        "error ": lambda row: f"{100 * row['step_error']:+.0f} %",
    }
    caption = (
        f"{measured.path}: {measured.shape.name}, TP={measured.ranks} on {measured.conditions['device']}; link "
        f"{args.link}; rates of a rank {source}, divided by {measured.ranks_a_processor:g} (ranks that share what one "
        f"had). Largest errors: {100 * worst['ttft']:+.0f} % and {100 * worst['step']:+.0f} %."
    )
    more = {"link": args.link, "validated": measured.conditions, "alone": str(args.alone) if args.alone else None}
    return rows, [output.table("MODELLED beside measured", rows, columns, caption)], more


def _tables(rows: Sequence[Mapping[str, Any]], scheme: CommScheme, caption: str, leading: Sequence[str]) -> list[Table]:
    def columns(phase: str) -> Columns:
        def share(row: Mapping[str, Any], name: str) -> str:
            communication = row[f"{name}_communication_s"] + row[f"{name}_elsewhere_s"]
            return f"{100 * communication / row[f'{name}_seconds']:.0f} %"

        first: Columns = {name: (lambda row, name=name: row[name]) for name in leading}  # type: ignore[misc]
        size: Columns = {"GB a rank": lambda row: f"{row['weights_nbytes'] / 1e9:.1f}"}
        return {
            **first,
            **size,
            "prompt": lambda row: f"{row['prompt_tokens']:,}",
            "16 bits, ms": lambda row: f"{1e3 * row[f'{phase}_16_seconds']:,.2f}",
            f"{scheme.name}, ms": lambda row: f"{1e3 * row[f'{phase}_seconds']:,.2f}",
            "gain": lambda row: f"{row[f'{phase}_gain']:.2f}x",
            "sent, 16 bits": lambda row: share(row, f"{phase}_16"),
            f"sent, {scheme.name}": lambda row: share(row, phase),
            "took": lambda row: row[f"{phase}_all_reduce_collective"] or "-",
        }

    note = (
        f" Nothing here is measured. 16 bits: plain values and no codec; batch {rows[0]['batch']}; sent: share of the "
        "time in communication; GB a rank: weights; took: the policy's collective."
    )
    return [
        output.table("MODELLED time to first token", rows, columns("first"), ""),
        output.table("MODELLED time per token", rows, columns("step"), caption + note),
    ]
