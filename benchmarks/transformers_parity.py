"""Our model beside transformers on the same weights: logits, greedy text, and tokens a second, in one run.

    python benchmarks/transformers_parity.py CHECKPOINT --text FILE [--json FILE]
    torchrun --standalone --nproc-per-node 2 benchmarks/transformers_parity.py CHECKPOINT --text FILE

CHECKPOINT: anything `megatron-lowbit generate` takes, of the Llama family. Logits and greedy text are compared in FP32
with the scheme `exact`; speed is timed at one rank only, in bf16 and FP32, the two implementations taking turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit_tools import output
from megatron_lowbit import ParallelContext, SamplingParams, Tokenizer, load_weights, parse_scheme
from megatron_lowbit.checkpoint.open import open_checkpoint
from megatron_lowbit.checkpoint.reader import CheckpointReader
from megatron_lowbit.generate import TokenGeneration
from megatron_lowbit.layers.kv_cache import TokenBatch

TOKENS, NEW_TOKENS, SPEED_ROUNDS, SPEED_NEW_TOKENS = 1000, 200, 7, 33


def transformers_model(reader: CheckpointReader, dtype: torch.dtype) -> LlamaForCausalLM:
    """transformers' Llama with the checkpoint's very tensors."""
    ours = reader.config
    assert ours.rope_scaling is None, "checkpoints with scaled rotary embeddings are not set up here"
    config = LlamaConfig(
        hidden_size=ours.hidden_size, intermediate_size=ours.intermediate_size, num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads, num_key_value_heads=ours.num_kv_heads, head_dim=ours.head_dim,
        vocab_size=ours.vocab_size, max_position_embeddings=ours.max_position, rms_norm_eps=ours.rms_norm_eps,
        tie_word_embeddings=ours.tie_embeddings, attention_bias=ours.attention_bias, mlp_bias=ours.mlp_bias,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    state = {name: reader.read(name).to(dtype) for name in reader.names()}
    if ours.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


@torch.inference_mode()
def parity(context: ParallelContext, path: Path, ids: list[int]) -> dict[str, object]:
    """Largest difference of FP32 logits over TOKENS tokens, and how many greedy tokens agree."""
    weights = load_weights(path, context, torch.float32)
    model = weights.build_with_scheme(parse_scheme("exact"))
    hidden_TH = model(TokenBatch.prompts([ids[:TOKENS]], context.device))
    head = model.head
    mine_TV = head.precise_logits(hidden_TH)
    theirs = transformers_model(open_checkpoint(path), torch.float32)
    expected_TV = theirs(torch.tensor([ids[:TOKENS]])).logits[0]
    shard = expected_TV[:, head.start : head.start + mine_TV.shape[1]]
    worst = max(context.all_gather_json(float((mine_TV - shard).abs().max())))
    generation = TokenGeneration(model, [ids[:64]], SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))
    tokens = [generation.step()[0] for _ in range(NEW_TOKENS)]
    wanted = theirs.generate(torch.tensor([ids[:64]]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, 64:].tolist()
    equal = next((i for i, (a, b) in enumerate(zip(tokens, wanted, strict=True)) if a != b), NEW_TOKENS)
    return {
        "tp": context.size, "virtual_ranks": context.virtual, "tokens": TOKENS, "largest_logit_difference": worst,
        "greedy_tokens": NEW_TOKENS, "equal_greedy_tokens": equal,
    }  # fmt: skip


@torch.inference_mode()
def speed(context: ParallelContext, path: Path, ids: list[int], dtype: torch.dtype) -> dict[str, object]:
    """Median tokens a second of prefill (512 tokens) and decode, turn by turn; ratios above 1 are faster."""
    weights = load_weights(path, context, dtype)
    model = weights.build_with_scheme(parse_scheme("exact"))
    theirs = transformers_model(open_checkpoint(path), dtype)
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
    parser.add_argument("--virtual-tp", type=int, default=1, metavar="N")
    parser.add_argument("--speed", action="store_true", help="time both at one rank")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    context = (
        ParallelContext.virtual_ranks(args.virtual_tp)
        if args.virtual_tp > 1
        else ParallelContext.from_environment("cpu")
    )
    ids = Tokenizer.from_directory(args.model).encode(args.text.read_text()[:20_000])
    rows = [parity(context, args.model, ids)]
    if args.speed and context.size == 1:
        rows += [speed(context, args.model, ids, dtype) for dtype in (torch.bfloat16, torch.float32)]
    for row in rows:
        output.console(context).print(row)
    facts = output.conditions(context, model=args.model.name, text=args.text.name)
    output.write_json(args.json, context, facts, rows)
    context.close()


if __name__ == "__main__":
    main()
