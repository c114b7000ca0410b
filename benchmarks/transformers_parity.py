"""Our model beside transformers on the same weights: logits, greedy text, perplexity, and tokens a second, in one run.

    python benchmarks/transformers_parity.py CHECKPOINT --text FILE [--windows 8] [--json FILE]
    torchrun --standalone --nproc-per-node 2 benchmarks/transformers_parity.py CHECKPOINT --text FILE

CHECKPOINT: anything `megatron-lowbit generate` takes, of any family. transformers loads what `megatron-lowbit export`
makes of it. Logits, greedy text and perplexity are compared in FP32 with the scheme `exact`; speed is timed at one rank
only, in bf16 and FP32, the two implementations taking turns.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from checkpoints_conv.export import export
from lowbit_tools import output
from megatron_lowbit import ParallelContext, SamplingParams, Tokenizer, load_weights, parse_scheme
from megatron_lowbit.checkpoint.open import open_checkpoint
from megatron_lowbit.generate import TokenGeneration
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.models.decoder import Decoder
from megatron_lowbit.vocab_parallel import log_normaliser, sum_over_ranks
from megatron_lowbit.windows import text_windows

TOKENS, SPEED_ROUNDS, SPEED_NEW_TOKENS = 1000, 7, 33
WINDOW_TOKENS, ROWS = 512, 64
PURPOSE = "evaluation"


def transformers_model(path: Path, dtype: torch.dtype) -> Any:
    """transformers' model of the checkpoint's very tensors."""
    config = open_checkpoint(path).config
    # the other implementations leave out soft caps and sinks
    eager = config.attention_softcap is not None or config.attention_sinks
    with tempfile.TemporaryDirectory() as folder:
        export(path, Path(folder) / "exported", dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "exported", dtype=dtype, attn_implementation="eager" if eager else "sdpa"
        )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


@dataclass(frozen=True)
class Expected:
    """What transformers makes of the text: logits of its first TOKENS tokens, the greedy tokens behind 64 of them, and
    -log p summed over each window's tokens but the first."""

    logits_TV: torch.Tensor
    greedy: list[int]
    nll: float


@torch.inference_mode()
def expected_of(path: Path, ids: list[int], windows: list[list[int]], greedy: int) -> Expected:
    theirs = transformers_model(path, torch.float32)
    logits_TV = theirs(torch.tensor([ids[:TOKENS]])).logits[0]
    tokens = theirs.generate(torch.tensor([ids[:64]]), max_new_tokens=max(1, greedy), do_sample=False)[0, 64:].tolist()
    nll = 0.0
    for window in windows:
        window_TV, targets_T = theirs(torch.tensor([window])).logits[0, :-1], torch.tensor(window[1:])
        for rows_NV, targets_N in zip(window_TV.split(ROWS), targets_T.split(ROWS), strict=True):
            # in FP64: torch's FP32 loss over a large vocabulary is off by some 1e-6 a token, always to one side
            nll += float(torch.nn.functional.cross_entropy(rows_NV.double(), targets_N, reduction="sum"))
    return Expected(logits_TV, tokens[:greedy], nll)


@torch.inference_mode()
def parity(
    context: ParallelContext, path: Path, ids: list[int], windows: list[list[int]], expected: Expected
) -> dict[str, object]:
    """Largest difference of FP32 logits over TOKENS tokens, how many greedy tokens agree, and both perplexities."""
    model = load_weights(path, context, torch.float32).build_with_scheme(parse_scheme("exact"))
    head = model.head
    mine_TV = head.precise_logits(model(TokenBatch.prompts([ids[:TOKENS]], context.device)))
    shard = expected.logits_TV[:, head.start : head.start + mine_TV.shape[1]]
    worst = max(context.all_gather_json(float((mine_TV - shard).abs().max())))
    row: dict[str, object] = {
        "tp": context.size, "virtual_ranks": context.virtual, "tokens": TOKENS, "largest_logit_difference": worst,
        "largest_logit": float(expected.logits_TV.abs().max()),
    }  # fmt: skip
    if expected.greedy:
        count = len(expected.greedy)
        generation = TokenGeneration(model, [ids[:64]], SamplingParams(max_new_tokens=count, ignore_eos=True))
        pairs = [(generation.step()[0], wanted) for wanted in expected.greedy]
        row |= {
            "greedy_tokens": count,
            "equal_greedy_tokens": next((i for i, (a, b) in enumerate(pairs) if a != b), count),
        }
    if windows:
        scored = sum(len(window) - 1 for window in windows)
        nll = sum(our_nll(context, model, window) for window in windows)
        row |= {
            "windows": len(windows), "perplexity": math.exp(nll / scored),
            "transformers_perplexity": math.exp(expected.nll / scored),
            "perplexity_ratio": math.exp((nll - expected.nll) / scored),
        }  # fmt: skip
    return row


def our_nll(context: ParallelContext, model: Decoder, window: list[int]) -> float:
    """Sum of -log p over the tokens of a window but the first; every rank holds a part of the vocabulary."""
    logits_TV = model.head.precise_logits(model(TokenBatch.prompts([window], context.device)))[:-1]
    targets_T = torch.tensor(window[1:])
    local_T = targets_T - model.head.start
    mine_T = (local_T >= 0) & (local_T < logits_TV.shape[1])
    chosen_T = logits_TV.gather(1, local_T.clamp(0, logits_TV.shape[1] - 1).unsqueeze(1)).squeeze(1)
    chosen_T = sum_over_ranks(context, torch.where(mine_T, chosen_T, torch.zeros(())), PURPOSE)
    return float((log_normaliser(context, logits_TV, PURPOSE) - chosen_T).double().sum())


@torch.inference_mode()
def speed(context: ParallelContext, path: Path, ids: list[int], dtype: torch.dtype) -> dict[str, object]:
    """Median tokens a second of prefill (512 tokens) and decode, turn by turn; ratios above 1 are faster."""
    weights = load_weights(path, context, dtype)
    model = weights.build_with_scheme(parse_scheme("exact"))
    theirs = transformers_model(path, dtype)
    prompt = ids[:512]

    def ours(new: int) -> float:
        generation = TokenGeneration(model, [prompt], SamplingParams(max_new_tokens=new, ignore_eos=True))
        return _seconds(lambda: [generation.step() for _ in range(new)])

    def transformers(new: int) -> float:
        return _seconds(lambda: theirs.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False))

    prefill: dict[str, list[float]] = {"ours": [], "transformers": []}
    decode: dict[str, list[float]] = {"ours": [], "transformers": []}
    for turn in range(SPEED_ROUNDS + 1):
        for name, run in (("ours", ours), ("transformers", transformers)):
            first = run(1)
            rest = run(SPEED_NEW_TOKENS) - first
            if turn:  # the first turn warms up
                prefill[name].append(first)
                decode[name].append(rest / (SPEED_NEW_TOKENS - 1))
    medians = {
        f"{name}_{kind}_tokens_per_s": count / statistics.median(times[name])
        for kind, times, count in (("prefill", prefill, len(prompt)), ("decode", decode, 1))
        for name in times
    }
    return {
        "dtype": str(dtype), **medians,
        "prefill_ratio": statistics.median(
            [t / o for o, t in zip(prefill["ours"], prefill["transformers"], strict=True)]
        ),
        "decode_ratio": statistics.median([t / o for o, t in zip(decode["ours"], decode["transformers"], strict=True)]),
    }  # fmt: skip


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--windows", type=int, default=8, metavar="N", help="for perplexity; 512 tokens each")
    parser.add_argument("--greedy", type=int, default=200, metavar="N", help="tokens to generate behind 64")
    parser.add_argument("--virtual-tp", default="", metavar="N,M,…", help="compare at these numbers of virtual ranks")
    parser.add_argument("--speed", action="store_true", help="time both at one rank")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    context = ParallelContext.from_environment("cpu")
    tokenizer, text = Tokenizer.from_directory(args.model), args.text.read_text()
    ids = tokenizer.encode(text[:20_000])
    windows = text_windows(tokenizer, text, args.windows, WINDOW_TOKENS, 1, args.text.name) if args.windows else []
    expected = expected_of(args.model, ids, windows, args.greedy)
    sizes = [int(size) for size in args.virtual_tp.split(",") if size]
    contexts = [context if size == 1 else ParallelContext.virtual_ranks(size) for size in sizes] or [context]
    rows = [parity(each, args.model, ids, windows, expected) for each in contexts]
    if args.speed and context.size == 1:
        rows += [speed(context, args.model, ids, dtype) for dtype in (torch.bfloat16, torch.float32)]
    for row in rows:
        output.console(context).print(row)
    facts = output.conditions(context, model=args.model.name, text=args.text.name)
    output.write_json(args.json, context, facts, rows)
    context.close()


if __name__ == "__main__":
    main()
