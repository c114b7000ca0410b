"""How fast `convert` is beside `cp` of the same bytes on the same disk, and how much memory it takes.

    python benchmarks/convert_speed.py [--sizes 0.1,1,4] [--rounds 3] [--folder DIR] [--real-shapes] [--json FILE]

Each round runs cp + sync, then convert for TP 1 and 2 (which syncs its files), one after the other in processes of
their own; the medians stand in the table. Sources are bf16 safetensors of random bits, read once before, so that both
read from memory: nobody can empty a shared machine's caches. Peak memory is that of the process, less what it held when
its imports were done. --real-shapes: layers of Llama-2-13B and Gemma-2-27B as they are, instead of sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from checkpoints_conv.streaming_writer import safetensors_header
from megatron_lowbit.checkpoint.weight_files import INDEX_FILE
from megatron_lowbit.models.registry import config_from_hf, stored_parts, tensor_sources

LLAMA_LAYER: dict[str, Any] = dict(
    model_type="llama", hidden_size=2048, intermediate_size=5632, num_attention_heads=16, num_key_value_heads=4,
    vocab_size=8192, max_position_embeddings=2048,
)  # fmt: skip
REAL_SHAPES: dict[str, dict[str, Any]] = {
    "Llama-2-13B, 2 layers": dict(
        model_type="llama", hidden_size=5120, intermediate_size=13824, num_hidden_layers=2, num_attention_heads=40,
        num_key_value_heads=40, vocab_size=32000, max_position_embeddings=4096,
    ),
    "Gemma-2-27B, 2 layers": dict(
        model_type="gemma2", hidden_size=4608, intermediate_size=36864, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=16, head_dim=128, vocab_size=256000, query_pre_attn_scalar=144, sliding_window=4096,
    ),
}  # fmt: skip
SHARD_NBYTES = 2_000_000_000
CHILD = """
import re, sys, time
from pathlib import Path
import torch
from checkpoints_conv.convert import convert
status = Path("/proc/self/status")
def nbytes(what):
    return int(re.search(what + r":\\s+(\\d+) kB", status.read_text())[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: that of the imports, and of the parent
before = nbytes("VmRSS")
began = time.perf_counter()
convert(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), torch.bfloat16)
took = time.perf_counter() - began
print(took, nbytes("VmHWM") - before)
"""


def write_source(directory: Path, hf: dict[str, Any]) -> tuple[int, int]:
    """A checkpoint of random finite bf16 values, in shards; (bytes of all weights, of the largest stored tensor)."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf))
    config = config_from_hf(hf, "benchmark")
    parts = stored_parts(config)
    shapes = {name: source.shape for name, source in tensor_sources(config).items() if name not in parts}
    shapes |= {part.name: part.shape for part in parts.values()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(map(math.prod, shards[-1].values())) * 2 > SHARD_NBYTES:
            shards.append({})
        shards[-1][name] = shape
    pool = torch.randn(32 << 20, generator=torch.Generator().manual_seed(1)).bfloat16().view(torch.uint8).numpy().data
    weight_map = {}
    for index, shard in enumerate(shards):
        file_name = f"model-{index:05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file_name)
        with (directory / file_name).open("wb") as file:
            file.write(safetensors_header(shard, torch.bfloat16))
            for shape in shard.values():
                rest = math.prod(shape) * 2
                while rest:
                    rest -= file.write(pool[: min(rest, len(pool))])
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    numels = [math.prod(shape) for shape in shapes.values()]
    return 2 * sum(numels), 2 * max(numels)


def copied(source: Path, out: Path) -> float:
    """Seconds of cp and of bringing the copy to the disk."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    subprocess.run(["sync", *map(str, out.iterdir())], check=True)
    return time.perf_counter() - began


def converted(source: Path, out: Path, tp: int) -> tuple[float, int]:
    """(seconds, peak memory in bytes beyond that of the imports)."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(out), str(tp)], capture_output=True, text=True, check=True
    )
    seconds, nbytes = done.stdout.split()
    return float(seconds), int(nbytes)


def measure(
    name: str, hf: dict[str, Any], folder: Path, rounds: int, sizes_tp: tuple[int, ...]
) -> list[dict[str, Any]]:
    source, out = folder / "source", folder / "out"
    nbytes, largest = write_source(source, hf)
    subprocess.run(["sync"], check=True)
    copies: list[float] = []
    runs: dict[int, list[tuple[float, int]]] = {tp: [] for tp in sizes_tp}
    for _ in range(rounds):
        copies.append(copied(source, out))
        shutil.rmtree(out)
        for tp in sizes_tp:
            runs[tp].append(converted(source, out, tp))
            shutil.rmtree(out)
    shutil.rmtree(source)
    copy = statistics.median(copies)
    return [
        {
            "checkpoint": name,
            "nbytes": nbytes,
            "largest_tensor_nbytes": largest,
            "tp": tp,
            "copy_s": copy,
            "convert_s": (median := statistics.median(seconds for seconds, _ in found)),
            "share_of_copy_speed": copy / median,
            "peak_nbytes": max(peak for _, peak in found),
        }
        for tp, found in runs.items()
    ]


def hash_rate() -> float:
    """Bytes a second of SHA-256 on one core."""
    data = bytes(256 << 20)
    began = time.perf_counter()
    hashlib.sha256(data).digest()
    return len(data) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="0.1,1,4", help="GB of weights, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: temporary files")
    parser.add_argument("--real-shapes", action="store_true", help="full-size layers of real models instead of sizes")
    parser.add_argument("--json", type=Path, default=None, help="write the rows")
    args = parser.parse_args()
    cases = dict(REAL_SHAPES)
    if not args.real_shapes:
        layer = tensor_sources(config_from_hf({**LLAMA_LAYER, "num_hidden_layers": 1}, "benchmark"))
        layer_nbytes = 2 * sum(math.prod(source.shape) for name, source in layer.items() if ".layers." in name)
        cases = {
            f"{size} GB": {**LLAMA_LAYER, "num_hidden_layers": max(1, round(float(size) * 1e9 / layer_nbytes))}
            for size in args.sizes.split(",")
        }
    rows = []
    print(f"SHA-256 on one core: {hash_rate() / 1e9:.2f} GB/s\n")
    print("| checkpoint | bytes | TP | cp + sync | convert | speed beside cp | peak memory | largest tensor |")
    print("|---|---|---|---|---|---|---|---|")
    for name, hf in cases.items():
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for row in measure(name, hf, Path(folder), args.rounds, (2, 3) if args.real_shapes else (1, 2)):
                rows.append(row)
                print(
                    f"| {name} | {row['nbytes'] / 1e9:.2f} GB | {row['tp']} | {row['copy_s']:.2f} s "
                    f"| {row['convert_s']:.2f} s | {row['share_of_copy_speed']:.0%} "
                    f"| {row['peak_nbytes'] / 1e6:.0f} MB | {row['largest_tensor_nbytes'] / 1e6:.0f} MB |",
                    flush=True,
                )
    if args.json is not None:
        args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
