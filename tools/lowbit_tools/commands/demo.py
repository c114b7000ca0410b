"""`demo`: a real model over real ranks, 16 bits beside 4.19: text, quality, bytes and speed in one table."""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoints_conv.convert import convert
from lowbit_tools import local_ranks, model_arguments, output
from lowbit_tools.commands.evaluate import quality_table
from lowbit_tools.demo_model import fetch_demo_model
from lowbit_tools.demo_text import demo_text
from lowbit_tools.hub import resolve_model
from lowbit_tools.plots import quality_against_bits
from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.calibration_run import calibrate, text_digest
from megatron_lowbit.checkpoint.tensor_parallel import TensorParallelCheckpoint
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.evaluation import evaluate
from megatron_lowbit.generate import TokenGeneration
from megatron_lowbit.llm import LLM
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sampling import SamplingParams
from megatron_lowbit.tokenizer import Tokenizer
from megatron_lowbit.weights import DTYPES, ModelWeights, load_weights
from megatron_lowbit.windows import text_windows

NAME = "demo"
HELP = "Run a real model tensor-parallel at 16 and at 4.19 bits, and compare text, quality, bytes and speed."
SCHEMES = ("bf16", "int4", "int4-random", "int4-outlier", "int8-group")
SHOWN = ("bf16", "int4-outlier")
DEMO_MODEL = "SmolLM2-135M-Instruct"
DECODE_TOKENS = 17
LEAST_CALIBRATION = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="Hugging Face directory, GGUF file or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: prose of Python's own manual)")
    parser.add_argument("--out", type=Path, default=Path("quickstart"), metavar="DIR", help="default: quickstart")
    parser.add_argument("--prompt", default="Why is the sky blue?", help="what the model is asked")
    parser.add_argument("--sequences", type=int, default=128, metavar="N", help="calibration sequences at most")
    parser.add_argument("--windows", type=int, default=6, metavar="N", help="evaluation windows at most (default: 6)")
    parser.add_argument("--length", type=int, default=512, metavar="T", help="tokens a sequence (default: 512)")
    local_ranks.add_arguments(parser, virtual=False)


def check(args: argparse.Namespace) -> None:
    """FileNotFoundError for a text that is not there, before any rank starts."""
    if args.text is not None:
        model_arguments.check_text(args.text)


def run(args: argparse.Namespace) -> None:
    context = local_ranks.context_of(args)
    screen = output.console(context)
    began = time.perf_counter()

    def step(what: str) -> None:
        screen.print(f"{what} ({time.perf_counter() - began:.0f} s so far)")

    if context.size < 2:
        raise ValueError("the demo compares what ranks send each other: start at least 2 with --tp 2 or torchrun")
    calibration_text, evaluation_text = context.together(functools.partial(_texts, args.text))
    step(f"[1/5] checkpoint for {context.size} ranks")
    checkpoint = context.together(functools.partial(_converted, args, context))
    checkpoint = Path(context.broadcast_json(str(checkpoint)))
    tokenizer = Tokenizer.from_directory(checkpoint)
    weights = load_weights(checkpoint, context)
    what = str(args.text or "the Python manual's prose")
    windows = text_windows(tokenizer, evaluation_text, args.windows, args.length, 1, what)

    step("[2/5] calibration")
    calibration = _calibrated(args, weights, tokenizer, calibration_text, what)

    step(f"[3/5] {SHOWN[0]} and {SHOWN[1]} answer: {args.prompt}")
    models = {
        name: LLM(weights, scheme=name, calibration=calibration, tokenizer=tokenizer, context=context)
        for name in SCHEMES
    }
    for name in SHOWN:
        screen.rule(f"{name}, {_bits(name, weights):.2f} bits a value", align="left")
        _answer(models[name], args.prompt, screen)
    screen.rule()

    step("[4/5] decode speed")
    decode_speed = _decode_speed(models, windows[0][:64])

    step("[5/5] quality on held-out text")
    with output.progress_bar("evaluating (passes)", context) as progress:
        evaluated = evaluate(weights, SCHEMES, windows, calibration, progress)
    rows = [asdict(row) | {"decode_tokens_per_s": decode_speed[row.scheme]} for row in evaluated]
    facts = output.conditions(
        context, model=checkpoint.name, dtype=model_arguments.dtype_name(weights), text=what, windows=len(windows),
        length=args.length, calibration_sequences=calibration.sequences, hidden=weights.config.hidden_size,
    )  # fmt: skip
    screen.print(quality_table(rows, facts))
    results, picture = args.out / "results.json", args.out / "quality.png"
    output.write_json(results, context, facts, rows)
    if context.is_first:
        quality_against_bits(rows, facts, picture)
    screen.print(f"table: {results}\npicture: {picture}\ncheckpoint: {checkpoint}")
    context.close()


def _texts(path: Path | None) -> tuple[str, str]:
    """Calibration and evaluation parts of the user's text (three quarters and the rest) or of the built-in one."""
    if path is None:
        return demo_text()
    text = model_arguments.read_text(path)
    middle = 3 * len(text) // 4
    return text[:middle], text[middle:]


def _converted(args: argparse.Namespace, context: ParallelContext) -> Path | None:
    """The converted checkpoint below `--out`, made by rank 0 unless an earlier run left it."""
    if not context.is_first:
        return None
    source = None if args.model is None else resolve_model(args.model)
    name = DEMO_MODEL if source is None else source.stem if source.is_file() else source.resolve().name
    target = args.out / f"{name}-tp{context.size}"
    if target.is_dir():
        TensorParallelCheckpoint(target)  # raises where it is damaged, naming the file
        return target
    if source is None:
        with output.progress_bar(f"fetching {DEMO_MODEL} (bytes)") as progress:
            source = fetch_demo_model(args.out / "downloads", lambda step, done, total: progress(done, total))
    with output.progress_bar("converting (bytes)") as progress:
        convert(source, target, context.size, DTYPES["bf16"], progress=progress)
    return target


def _calibrated(
    args: argparse.Namespace, weights: ModelWeights, tokenizer: Tokenizer, text: str, what: str
) -> CommCalibration:
    """The calibration below `--out`, made anew where there is none for this model, size, text and settings."""
    context = weights.context
    digest = text_digest(text)
    sequences = text_windows(tokenizer, text, args.sequences, args.length, LEAST_CALIBRATION, what)
    path = args.out / f"calibration-tp{context.size}-{digest[:8]}-{len(sequences)}x{args.length}.safetensors"
    if all(context.all_gather_json(path.is_file())):
        found = context.together(functools.partial(CommCalibration.load, path))
        if found.fingerprint == weights.fingerprint:
            return found
    with output.progress_bar("calibrating (sequences)", context) as progress:
        calibration = calibrate(weights, sequences, digest, progress)
    context.together(lambda: calibration.save(path) if context.is_first else None)
    return calibration


def _answer(llm: LLM, prompt: str, screen: Any) -> None:
    params = SamplingParams(max_new_tokens=60)
    if llm.tokenizer.chat_template is None:
        events = llm.stream([prompt], params)
    else:
        events = llm.chat_stream([[{"role": "user", "content": prompt}]], params)
    for event in events:
        screen.out(event.text, end="")
    screen.out("")


def _decode_speed(models: dict[str, LLM], prompt: list[int]) -> dict[str, float]:
    """Tokens a second of single-sequence decode, the schemes taking turns token by token."""
    params = SamplingParams(max_new_tokens=DECODE_TOKENS)
    generations = {name: TokenGeneration(llm.model, [prompt], params) for name, llm in models.items()}
    for _ in range(DECODE_TOKENS):
        for generation in generations.values():
            generation.step()
    return {name: generation.times.decode_tokens_per_s for name, generation in generations.items()}


def _bits(name: str, weights: ModelWeights) -> float:
    return parse_scheme(name).reduce_stage.wire_bits_per_value(weights.config.hidden_size)
