"""What schemes lose on text unlike the one they were calibrated on, beside schemes without a predictor.

    python benchmarks/other_texts.py CHECKPOINT CALIBRATION --virtual-tp 4 --schemes balanced,balanced-portable \
        --texts code=FILE,german=FILE,chat=FILE [--json FILE]

One row a text and scheme; `random` tokens, drawn evenly from the vocabulary, are always among the texts.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowbit_tools import model_arguments, output
from megatron_lowbit.evaluation import evaluate
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.tokenizer import Tokenizer
from megatron_lowbit.weights import load_weights
from megatron_lowbit.windows import text_windows

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--virtual-tp", type=int, default=4)
    parser.add_argument("--schemes", default="balanced,balanced-portable")
    parser.add_argument("--texts", default="", help="NAME=FILE,…")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    context = ParallelContext.virtual_ranks(args.virtual_tp)
    weights = load_weights(args.model, context)
    tokenizer = Tokenizer.from_directory(args.model)
    calibration = model_arguments.load_calibration(args.calibration, context)
    schemes = model_arguments.load_schemes(args.schemes, context)
    named = dict(each.split("=", 1) for each in args.texts.split(",") if each)
    texts = {
        name: text_windows(tokenizer, Path(path).read_text(), args.windows, args.length, 1, name)
        for name, path in named.items()
    }
    drawn = random.Random(SEED)
    vocabulary = weights.config.vocab_size
    texts["random"] = [[drawn.randrange(vocabulary) for _ in range(args.length)] for _ in range(args.windows)]
    rows: list[dict[str, Any]] = []
    for name, windows in texts.items():
        rows += [{"text": name, **asdict(row)} for row in evaluate(weights, schemes, windows, calibration)]
    facts = output.conditions(
        context, model=args.model.name, dtype=model_arguments.dtype_name(weights), windows=args.windows,
        length=args.length, texts=list(texts), seed=SEED,
    )  # fmt: skip
    columns = {
        "text": lambda row: row["text"],
        "scheme": lambda row: row["scheme"],
        "perplexity": lambda row: f"{row['perplexity']:,.2f}",
        "to exact": lambda row: f"{100 * (row['perplexity_ratio'] - 1):+.1f} %",
        "KL": lambda row: f"{row['kl_mean']:.4f} ± {row['kl_stderr']:.4f}",
        "top-1": lambda row: f"{100 * row['top1_agreement']:.1f} %",
        "not finite": lambda row: str(row["non_finite"]),
    }
    output.console(context).print(output.table("Other texts", rows, columns, args.model.name))
    output.write_json(args.json, context, facts, rows)


if __name__ == "__main__":
    main()
