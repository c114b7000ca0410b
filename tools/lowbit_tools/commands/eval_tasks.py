"""`eval-tasks`: scores of zero-shot tasks under schemes, beside those of 16 bits on the same questions."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lowbit_tools import local_ranks, model_arguments, output
from megatron_lowbit.task_evaluation import ACC, BASELINE, MEAN, evaluate_tasks
from megatron_lowbit.task_questions import ANSWER_PREFIX, Task, read_task

NAME = "eval-tasks"
HELP = "Measure what schemes do to a model's answers to zero-shot tasks, beside those of 16 bits."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments.add_arguments(parser)
    parser.add_argument(
        "--tasks", required=True, metavar="FILE[,FILE]",
        help='JSON lines, {"query", "choices", "gold"} or {"context", "continuation"}; several files, comma-separated',
    )  # fmt: skip
    parser.add_argument("--schemes", required=True, help=f"comma-separated, as for eval; {BASELINE} is run in any case")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="from `megatron-lowbit calibrate`")
    parser.add_argument("--limit", type=int, metavar="N", help="questions a task, evenly spaced (default: all)")
    parser.add_argument(
        "--answer-prefix", default=ANSWER_PREFIX, metavar="TEXT",
        help=f"begins the answer's line, where a query ends in a line break (default: {ANSWER_PREFIX})",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError for arguments that make no sense, before any rank starts."""
    model_arguments.check_schemes(args.schemes)
    _read(args)


def _read(args: argparse.Namespace) -> list[Task]:
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit is {args.limit}; it must be at least 1")
    tasks = [read_task(Path(name.strip())) for name in args.tasks.split(",")]
    names = [task.name for task in tasks]
    repeated = {name for name in names if names.count(name) > 1 or name == MEAN}
    if repeated:
        raise ValueError(
            f"--tasks: several rows would be called {', '.join(sorted(repeated))}; rename one of the files"
        )
    return tasks if args.limit is None else [task.limited(args.limit) for task in tasks]


def run(args: argparse.Namespace) -> None:
    context = local_ranks.context_of(args)
    schemes = model_arguments.load_schemes(args.schemes, context)
    tasks = context.together(lambda: _read(args))
    context.agree_same([task.digest for task in tasks], "the tasks' files")
    weights, tokenizer = model_arguments.load(args, context)
    calibration = model_arguments.load_calibration(args.calibration, context)
    with output.progress_bar("answering (passes)", context) as progress:
        evaluated = evaluate_tasks(
            weights, schemes, tasks, tokenizer, calibration, progress, args.backend, args.answer_prefix
        )
    rows = [row.fields() for row in evaluated]
    facts = output.conditions(
        context, model=str(args.model), dtype=model_arguments.dtype_name(weights), fingerprint=weights.fingerprint,
        tasks={task.name: {"kind": task.kind, "questions": len(task.questions), "sha256": task.digest}
               for task in tasks},
        limit=args.limit, answer_prefix=args.answer_prefix, baseline=BASELINE,
        calibration_sequences=calibration.sequences if calibration else None,
    )  # fmt: skip
    output.console(context).print(task_table(rows, facts))
    output.write_json(args.json, context, facts, rows)
    context.close()


def task_table(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> Table:
    """Scores in percent, with their conditions below."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "task": lambda row: row["task"],
        "questions": lambda row: f"{row['questions']:,}",
        "scheme": lambda row: row["scheme"],
        "metric": lambda row: row["metric"],
        "score\n%": lambda row: f"{100 * row['score']:.1f}",
        f"to {BASELINE}'s\npoints": lambda row: _interval(row, "difference", "+"),
        "retained\n%": lambda row: _interval(row, "retained", ""),
        "flips, %\nto wrong / right": lambda row: (
            f"{100 * row['flips']:.1f} ({100 * row['right_to_wrong']:.1f} / {100 * row['wrong_to_right']:.1f})"
        ),
        "nats": lambda row: "-" if row["log_likelihood"] is None else f"{row['log_likelihood']:.3f}",
    }
    ranks = f"{facts['tp']} {'virtual ' if facts['virtual_ranks'] else ''}ranks"
    passed = [row for row in rows if row["task"] != MEAN and row["metric"] == ACC]
    speed = sum(row["tokens"] for row in passed) / sum(row["tokens"] / row["tokens_per_s"] for row in passed)
    caption = (
        f"{facts['model']}, {facts['dtype']}, {ranks}; 95 % intervals over questions, paired; nats: log-likelihood of "
        f"the right answer; {speed:,.0f} tokens/s, {facts['device']}, {facts['threads_per_rank']} thread(s) a rank, "
        f"torch {facts['torch']}"
    )
    return output.table(f"Answers beside those of {BASELINE}", rows, columns, caption)


def _interval(row: Mapping[str, Any], name: str, sign: str) -> str:
    """In percent or points, with its bounds; the baseline has none to itself."""

    def shown(key: str) -> str:
        return "-" if row[key] is None else f"{100 * row[key]:{sign}.1f}"

    return "-" if row["scheme"] == BASELINE else f"{shown(name)} [{shown(name + '_low')}, {shown(name + '_high')}]"
