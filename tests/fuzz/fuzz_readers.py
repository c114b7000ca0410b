"""Damages sound checkpoints in every way it can think of, and opens them: only clear errors may come out.

    python tests/fuzz/fuzz_readers.py --minutes 10 [--seed N]      # or --rounds N, to do the same again

Safetensors files, their index, PyTorch's .bin files, GGUF files and our own checkpoints with their manifest and config
are changed byte by byte or as JSON, then opened, checked and read as a conversion would. Whatever is raised must be a
ValueError or FileNotFoundError, within SECONDS_LIMIT, and the process may not grow by more than MEMORY_LIMIT_NBYTES.
Ends with exit code 1 at the first damage that breaks this; --keep DIR puts it there.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `helpers`, as pytest has it

from helpers.stored_checkpoints import hf_config, write_checkpoint

from checkpoints_conv.convert import convert, open_source
from megatron_lowbit.checkpoint.reader import check_complete
from megatron_lowbit.checkpoint.tensor_parallel import TensorParallelCheckpoint
from megatron_lowbit.models.registry import tensor_sources

SECONDS_LIMIT = 5
MEMORY_LIMIT_NBYTES = 400_000_000
ADDRESS_SPACE_NBYTES = 6_000_000_000
EXPECTED = (ValueError, FileNotFoundError)
NUMBERS = (0, 1, -1, 2, 127, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**30)
VALUES = (None, True, "", "../x", "/etc/passwd", "model.safetensors", [], [[]], {}, {"a": {}}, 1.5, 1e999, "\ud800", -5)


class TooSlow(BaseException):
    """Not an Exception, so that no reader can take it for damage."""


def make_corpus(folder: Path) -> dict[str, str]:
    """Sound checkpoints; what to open of each, by its folder's name."""
    write_checkpoint(folder / "safetensors", hf_config("phi3"), shards=2)
    write_checkpoint(folder / "experts", hf_config("gpt_oss"))
    write_checkpoint(folder / "bin", hf_config("llama"), shards=2, kind="bin")
    write_checkpoint(folder / "single-bin", hf_config("gemma2"), kind="bin")
    convert(folder / "safetensors", folder / "ours", 3, None)
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf" / "model.gguf")
    return {"safetensors": "", "experts": "", "bin": "", "single-bin": "", "ours": "", "gguf": "model.gguf"}


def write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    hidden, ffn, vocabulary = 32, 64, 17
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_array("tokenizer.ggml.tokens", [f"t{index}" for index in range(vocabulary)])
    shapes = {
        "token_embd": (vocabulary, hidden), "output_norm": (hidden,), "output": (vocabulary, hidden),
        "blk.0.attn_norm": (hidden,), "blk.0.ffn_norm": (hidden,), "blk.0.attn_q": (32, hidden),
        "blk.0.attn_k": (16, hidden), "blk.0.attn_v": (16, hidden), "blk.0.attn_output": (hidden, 32),
        "blk.0.ffn_gate": (ffn, hidden), "blk.0.ffn_up": (ffn, hidden), "blk.0.ffn_down": (hidden, ffn),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def attempt(path: Path) -> None:
    """What a conversion does with a source, up to writing."""
    reader = open_source(path)
    check_complete(reader, tensor_sources(reader.config))
    if isinstance(reader, TensorParallelCheckpoint):
        reader.verify_hashes()
    for name in sorted(reader.names()):
        shape = reader.shape(name)
        reader.dtype(name)
        reader.read(name)
        reader.read_span(name, len(shape) - 1, shape[-1] // 2, shape[-1])


def damaged_bytes(dice: random.Random, data: bytes) -> bytes:
    """Most of what matters stands at the beginning of a file, or at its end."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        reach = min(len(changed), dice.choice((16, 64, 512, 4096, 1 << 30))) or 1
        place = dice.randrange(reach)
        place = dice.choice((place, max(0, len(changed) - 1 - place)))
        count = dice.choice((1, 2, 8, 64, 1000))
        what = dice.randrange(8)
        if what == 0 and changed:
            changed[place % len(changed)] ^= 1 << dice.randrange(8)
        elif what == 1 and changed:
            changed[place % len(changed)] = dice.randrange(256)
        elif what == 2:
            del changed[place : place + count]
        elif what == 3:
            changed[place:place] = dice.randbytes(count)
        elif what == 4:
            del changed[-min(count, len(changed)) :]
        elif what == 5:
            changed[place : place + count] = bytes(count)
        elif what == 6:
            width = dice.choice((4, 8))
            number = dice.choice(NUMBERS) % (1 << 8 * width)
            changed[place : place + width] = number.to_bytes(width, "little")
        else:
            changed[place:place] = changed[place : place + count]
    return bytes(changed)


def damaged_json(dice: random.Random, value: Any) -> Any:
    """The same with one thing in it replaced, removed, repeated or renamed."""
    if dice.random() < 0.15 or not isinstance(value, (dict, list)) or not value:
        return dice.choice((*VALUES, *NUMBERS, 3, value))
    if isinstance(value, list):
        place = dice.randrange(len(value))
        return [*value[:place], damaged_json(dice, value[place]), *value[place + 1 :]]
    key = dice.choice(sorted(value))
    rest = {name: entry for name, entry in value.items() if name != key}
    what = dice.randrange(6)
    if what == 0:
        return rest
    if what == 1:
        return {**rest, str(dice.choice(VALUES)): value[key]}
    if what == 2:
        return {**value, key: value[dice.choice(sorted(value))]}
    return {**value, key: damaged_json(dice, value[key])}


def damaged_header(dice: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header is changed as JSON, its length put right."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(damaged_json(dice, json.loads(data[8 : 8 + length]))).encode()
    if dice.random() < 0.1:
        header = header[:-1] + b"," + header[1:]  # every name twice
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def damage(dice: random.Random, path: Path) -> str:
    """Changes a sound file of a checkpoint; says which, and how."""
    folder, data = path.parent, path.read_bytes()
    if dice.random() < 0.03:
        path.unlink()
        return f"{path.name}: removed"
    if dice.random() < 0.03:
        shutil.copyfile(dice.choice(sorted(folder.iterdir())), folder / "other")
        (folder / "other").replace(path)
        return f"{path.name}: another file"
    if path.suffix == ".json" and dice.random() < 0.7:
        path.write_text(json.dumps(damaged_json(dice, json.loads(data))))
        return f"{path.name}: JSON"
    if path.suffix == ".safetensors" and dice.random() < 0.5:
        path.write_bytes(damaged_header(dice, data))
        return f"{path.name}: header"
    path.write_bytes(damaged_bytes(dice, data))
    return f"{path.name}: bytes"


def record_damage(folder: Path) -> None:
    """Our checkpoints carry sums: they are put right, or no damage would get past them."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        from megatron_lowbit.checkpoint.manifest import sha256_of

        for name, entry in manifest["files"].items():
            entry.update(sha256=sha256_of(folder / name), nbytes=(folder / name).stat().st_size)
        path.write_text(json.dumps(manifest))
    except (ValueError, OSError, LookupError, TypeError, AttributeError):
        return


def limited(work: Callable[[Path], None], path: Path) -> str:
    """The kind of error that came out, "" for none. Raises what may not come out."""

    def ring(number: int, frame: object) -> None:
        raise TooSlow(f"more than {SECONDS_LIMIT} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_LIMIT)
    try:
        work(path)
        kind = ""
    except EXPECTED as error:
        kind = type(error).__name__
        str(error).encode("utf-8", "backslashreplace")
        if len(str(error)) > 2000:
            raise AssertionError(f"an error of {len(str(error))} characters") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown_nbytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown_nbytes > MEMORY_LIMIT_NBYTES:
        raise AssertionError(f"memory grew by {grown_nbytes:,} bytes")
    return kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=0, help="so many, however long they take, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=None, help="folder for the damage that got through")
    args = parser.parse_args()
    dice, counts = random.Random(args.seed), collections.Counter[str]()
    deadline = time.monotonic() + 60 * args.minutes
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        corpus, victim = Path(name) / "corpus", Path(name) / "victim"
        entries = make_corpus(corpus)
        for kind, file in entries.items():
            assert limited(attempt, corpus / kind / file) == "", f"{kind} is not sound"
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_NBYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
        done = 0
        while done < args.rounds if args.rounds else time.monotonic() < deadline:
            kind = dice.choice(sorted(entries))
            shutil.rmtree(victim, ignore_errors=True)
            shutil.copytree(corpus / kind, victim)
            files = sorted(victim.iterdir())
            how = "; ".join(damage(dice, path) for path in dice.sample(files, min(len(files), dice.choice((1, 1, 2)))))
            if kind == "ours" and dice.random() < 0.8:
                record_damage(victim)
            try:
                counts[f"{kind}: {limited(attempt, victim / entries[kind]) or 'read'}"] += 1
            except BaseException:
                traceback.print_exc()
                print(f"round {done} of seed {args.seed}: {kind}, {how}", file=sys.stderr)
                if args.keep is not None:
                    shutil.copytree(victim, args.keep, dirs_exist_ok=True)
                return 1
            done += 1
    print(f"{done} damaged checkpoints, seed {args.seed}")
    for what, count in sorted(counts.items()):
        print(f"  {what}: {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
