"""The command line in processes of its own, and a tiny random Llama with a tokenizer for it to work on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from helpers.tiny_models import random_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

HIDDEN, LAYERS = 128, 2
PROSE = " ".join(f"Sentence {number} of a text that nobody needs to remember." for number in range(120))


@dataclass(frozen=True)
class Workshop:
    """What the commands leave for each other: a Hugging Face folder, its conversion, its calibration, a text."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        return self.root / {"calibration": "calibration.safetensors", "text": "text.txt"}.get(name, name)


def call(*words: object, code: int = 0, torchrun: int = 0, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own, `torchrun`: started by it on that many ranks."""
    command = [sys.executable, "-m"]
    if torchrun:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun), "-m"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [*command, "lowbit_tools", *map(str, words)],
        capture_output=True, text=True, timeout=timeout_s, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    # torchrun reports 1 for any failure of a rank
    assert done.returncode == (1 if code and torchrun else code), done.stdout + done.stderr
    return done


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("megatron-lowbit: error")]


def make_workshop(root: Path) -> Workshop:
    """A Hugging Face folder, then through the command line its conversion and calibration for two ranks."""
    made = Workshop(root)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model = random_llama(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=256, bos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model.save_pretrained(made.hf)
    tokenizer.save(str(made.hf / "tokenizer.json"))
    (made.hf / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    made.text.write_text(PROSE, encoding="utf-8")

    call("convert", made.hf, made.tp2, "--tp", 2, "--dtype", "fp32", "--json", made.root / "convert.json")
    flags = ["--text", made.text, "--sequences", 20, "--length", 64]
    call("calibrate", made.tp2, made.calibration, "--tp", 2, *flags, "--json", made.root / "calibrate.json")
    return made
