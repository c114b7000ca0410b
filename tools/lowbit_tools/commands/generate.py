"""`generate`: continues prompts with a model under one scheme, streaming text."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from lowbit_tools import local_ranks, model_arguments, output
from megatron_lowbit.llm import LLM, TextEvent
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.sampling import SamplingParams

NAME = "generate"
HELP = "Continue prompts with a model under one communication scheme."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model_arguments.add_arguments(parser)
    parser.add_argument(
        "--prompt", action="append", required=True, help="text to continue; give it several times for a batch"
    )
    parser.add_argument(
        "--scheme", default="bf16",
        help="communication scheme, or a file of `megatron-lowbit tune-scheme` (default: bf16)",
    )  # fmt: skip
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="from `megatron-lowbit calibrate`")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument(
        "--top-k", type=int, default=50, help="sample among that many best tokens, 0: all (default: 50)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="smallest set with this probability (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; repeatable")
    parser.add_argument("--chat", action="store_true", help="wrap each prompt as a user's message in the chat format")
    model_arguments.add_policy_argument(parser, "which messages may go exactly or in one stage, by size")
    parser.add_argument("--stats", action="store_true", help="show tokens a second, bytes sent and saturation")


def check(args: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError for arguments that make no sense, before any rank starts."""
    model_arguments.check_schemes(args.scheme)
    _params(args)


def _params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed, tuple(args.stop))


def run(args: argparse.Namespace) -> None:
    params = _params(args)
    context = local_ranks.context_of(args)
    weights, tokenizer = model_arguments.load(args, context)
    calibration = model_arguments.load_calibration(args.calibration, context)
    (scheme,) = model_arguments.load_schemes(args.scheme, context)
    llm = LLM(
        weights, scheme=scheme, calibration=calibration, tokenizer=tokenizer, backend=args.backend,
        count_saturation=args.stats, policy=model_arguments.load_policy(args.policy, context),
    )  # fmt: skip
    context.traffic.reset()
    if args.chat:
        events = llm.chat_stream([[{"role": "user", "content": prompt}] for prompt in args.prompt], params)
    else:
        events = llm.stream(args.prompt, params)
    rows = show(events, args.prompt, context)
    for row in rows:
        row["scheme"] = args.scheme
    times = llm.times
    stats: dict[str, Any] = {
        "prefill_tokens_per_s": times.prefill_tokens_per_s,
        "decode_tokens_per_s": times.decode_tokens_per_s,
        "sent_nbytes": dict(context.traffic.sent_nbytes),
        "collectives": llm.policy_log.counts,
        "saturation": {
            name: {"values": counter.values, "saturated": counter.saturated, "non_finite": counter.non_finite}
            for name, counter in llm.saturation.items()
        },
    }
    if args.stats:
        sent = ", ".join(f"{purpose} {nbytes:,}" for purpose, nbytes in stats["sent_nbytes"].items()) or "nothing"
        output.console(context).print(
            f"prefill {times.prefill_tokens_per_s:.1f} tokens/s, decode {times.decode_tokens_per_s:.1f} tokens/s; "
            f"bytes sent by rank 0: {sent}"
        )
        taken = ", ".join(f"{name} {count:,} times" for name, count in llm.policy_log.counts.items())
        output.console(context).print(f"collectives: {taken or 'the scheme alone'}")
        _show_saturation(llm, output.console(context))
    facts = output.conditions(
        context, model=str(args.model), dtype=model_arguments.dtype_name(weights), temperature=args.temperature,
        top_k=args.top_k, top_p=args.top_p, seed=args.seed, **stats,
    )  # fmt: skip
    output.write_json(args.json, context, facts, rows)
    context.close()


def _show_saturation(llm: LLM, screen: Console) -> None:
    """The share of clamped values as rank 0 saw it, and the sync points where it is largest."""
    shares = {name: counter.saturated / max(counter.values, 1) for name, counter in llm.saturation.items()}
    values = sum(counter.values for counter in llm.saturation.values())
    saturated = sum(counter.saturated for counter in llm.saturation.values())
    non_finite = sum(counter.non_finite for counter in llm.saturation.values())
    worst = [f"{name} {100 * shares[name]:.2f} %" for name in sorted(shares, key=shares.__getitem__, reverse=True)[:3]]
    screen.print(
        f"saturated {100 * saturated / max(values, 1):.3f} % of {values:,} values encoded by rank 0, {non_finite} not "
        f"finite; most at {', '.join(worst) or 'none'}"
    )


def show(events: Iterator[TextEvent], prompts: list[str], context: ParallelContext) -> list[dict[str, object]]:
    """Streams one prompt's text as it comes; several are shown one after the other as they end. Returns JSON rows."""
    screen = output.console(context)
    texts, counts = [""] * len(prompts), [0] * len(prompts)
    reasons: list[str | None] = [None] * len(prompts)
    for event in events:
        texts[event.prompt] += event.text
        counts[event.prompt] += len(event.tokens)
        reasons[event.prompt] = event.finish_reason
        if len(prompts) == 1:
            screen.out(event.text, end="")
        elif event.finish_reason is not None:
            screen.out(f"--- {prompts[event.prompt]}\n{texts[event.prompt]}")
    if len(prompts) == 1:
        screen.out("")
    return [
        {"prompt": prompt, "text": text, "new_tokens": count, "finish_reason": reason}
        for prompt, text, count, reason in zip(prompts, texts, counts, reasons, strict=True)
    ]
