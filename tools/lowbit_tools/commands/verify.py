"""`verify`: whether a checkpoint is whole, equal to another, and computes what transformers computes."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from checkpoints_conv.verify import verify
from lowbit_tools import local_ranks, output
from megatron_lowbit.parallel import ParallelContext

NAME = "verify"
HELP = "Check a checkpoint: sums and shapes, its values against another's, its logits against transformers'."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="CKPT", help="converted checkpoint, or anything convert takes")
    parser.add_argument("--against", type=Path, metavar="DIR", help="compare every value with this checkpoint's")
    parser.add_argument(
        "--logits", action="store_true", help="compare logits with transformers', which loads DIR or an export of CKPT"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write conditions and rows as JSON")


check = local_ranks.check_nothing


def run(args: argparse.Namespace) -> None:
    with output.byte_progress_bar("verifying") as progress:
        found = verify(args.source, args.against, args.logits, progress)
    lines = [f"{found.tensors} tensors, all there and of the right shape"]
    if found.hashed_files:
        lines.append(f"{found.hashed_files} files with the recorded SHA-256")
    if found.compared_tensors is not None:
        lines.append(f"{found.compared_tensors} tensors equal those of {args.against} bit for bit")
    if found.logit_difference is not None:
        lines.append(
            f"FP32 logits up to {found.largest_logit:.1f}, at most {found.logit_difference:.1e} from transformers'"
        )
    output.console().print("\n".join((f"{args.source}: sound", *lines)), soft_wrap=True)
    context = ParallelContext.single()
    facts = output.conditions(context, source=str(args.source), against=args.against and str(args.against))
    output.write_json(args.json, context, facts, [asdict(found)])
