"""Times every step of the codec for one format, beside a copy of the same size: a process of its own for `gpu_check`.

Large: `[8192, 8192]`, each launch between two events, in turn with a device-to-device copy that moves the same number
of bytes; buffers alternate. Small: 1 to 64 tokens of 8192, a CUDA graph of many launches, in turn with a graph of as
many elementwise kernels that move the same bytes. Rows go to a file as they are measured, one JSON line each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lowbit_kernels import get_backend
from lowbit_tools.gpu_check_work import FORMATS, RANKS, Step, Work, layout_of

BATCH = 16  # timed launches that are queued together, behind a kernel that holds the device meanwhile
HOLD_CYCLES = 40_000_000  # about 20 ms


@dataclass(frozen=True)
class Sizes:
    """What is measured: message sizes, and how often."""

    hidden: int = 8192
    large_tokens: int = 8192
    small_tokens: tuple[int, ...] = (1, 4, 16, 64)
    rounds: int = 48
    launches: int = 20  # in a graph
    replays: int = 40


DRY_SIZES = Sizes(hidden=256, large_tokens=8, small_tokens=(1, 4), rounds=2, launches=2, replays=2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--format", required=True, action="append", choices=FORMATS)
    parser.add_argument("--rows", type=Path, help="file the rows are appended to")
    parser.add_argument("--warm-up", action="store_true", help="only compile, all formats at the same time")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: not a measurement")
    args = parser.parse_args(argv)
    if args.warm_up and len(args.format) > 1:
        sys.exit(_warm_up_together(args.format, args.dry_run))
    (name,) = args.format
    sizes = DRY_SIZES if args.dry_run else Sizes()
    device = torch.device("cpu" if args.dry_run else "cuda")
    module = get_backend("torch" if args.dry_run else "triton", device)
    layout = layout_of(name, sizes.hidden)
    Work(layout, 9, module, device, sets=1).check()
    if args.warm_up:
        for tokens in (sizes.large_tokens, *sizes.small_tokens):
            for step in Work(layout, tokens, module, device, sets=1).steps():
                step.run(0)
        return
    with args.rows.open("a") as file:

        def report(kind: str, tokens: int, step: Step, ours_us: list[float], base_us: list[float]) -> None:
            ours, base = statistics.median(ours_us), statistics.median(base_us)
            row = {
                "kind": kind, "format": name, "step": step.name, "tokens": tokens, "hidden": sizes.hidden,
                "ranks_summed": RANKS if step.name in ("decode_sum", "requantize") else 1,
                "nbytes": step.nbytes, "median_us": ours, "p10_us": _low(ours_us), "p90_us": _high(ours_us),
                "base": "copy" if kind == "large" else "elementwise", "base_median_us": base,
                "base_p10_us": _low(base_us), "base_p90_us": _high(base_us), "base_over_ours": base / ours,
                "gbytes_per_s": step.nbytes / ours / 1e3, "samples": len(ours_us),
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{kind:5} {name:13} {step.name:16} T={tokens:<5} {ours:9.2f} us, {base:9.2f} us", flush=True)

        for step in Work(layout, sizes.large_tokens, module, device, sets=2).steps():
            copy = _copy(step.nbytes, device)
            report("large", sizes.large_tokens, step, *_interleaved(step.run, copy, sizes.rounds, device))
        for tokens in sizes.small_tokens:
            for step in Work(layout, tokens, module, device, sets=2).steps():
                ours = _graph(step.run, sizes.launches, device)
                base = _graph(_elementwise(step.nbytes, device), sizes.launches, device)
                total = _interleaved(ours, base, sizes.replays, device)
                report("small", tokens, step, *([us / sizes.launches for us in each] for each in total))


def _warm_up_together(formats: list[str], dry_run: bool) -> int:
    """Triton compiles on one core for each process, and keeps what it has compiled for the next one."""
    command = [sys.executable, "-m", "lowbit_tools.gpu_check_timing", "--warm-up", *(["--dry-run"] if dry_run else [])]
    processes = [subprocess.Popen([*command, "--format", name]) for name in formats]
    return max(process.wait() for process in processes)


def _copy(nbytes: int, device: torch.device) -> Callable[[int], None]:
    """Moves `nbytes`: half of them read, half of them written. Buffers alternate as those of the step do."""
    buffers = torch.randint(256, (2, 2, nbytes // 2), dtype=torch.uint8, device=device)

    def copy(turn: int) -> None:
        buffers[turn, 0].copy_(buffers[turn, 1])

    return copy


def _elementwise(nbytes: int, device: torch.device) -> Callable[[int], None]:
    """The least a kernel can do that moves `nbytes`: negates FP32 values."""
    buffers = torch.randn(2, 2, max(1, nbytes // 8), device=device)

    def negate(turn: int) -> None:
        torch.neg(buffers[turn, 0], out=buffers[turn, 1])

    return negate


def _graph(run: Callable[[int], None], launches: int, device: torch.device) -> Callable[[int], None]:
    """A replay of `launches` launches on alternating buffers."""

    def all_of_them() -> None:
        for launch in range(launches):
            run(launch % 2)

    all_of_them()
    if device.type != "cuda":
        return lambda turn: all_of_them()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    return lambda turn: graph.replay()


def _interleaved(
    ours: Callable[[int], None], base: Callable[[int], None], rounds: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Microseconds of each call of both, taken in turns, after as many unmeasured ones as there are buffers, twice."""
    for turn in (0, 1, 0, 1):
        ours(turn)
        base(turn)
    if device.type != "cuda":
        return _by_wall_clock(ours, base, rounds)
    times: tuple[list[float], list[float]] = ([], [])
    for first in range(0, rounds, BATCH):
        torch.cuda.synchronize()
        # what follows is queued while the device is held, so that no launch waits for Python
        torch.cuda._sleep(HOLD_CYCLES)
        marks = []
        for index in range(first, min(first + BATCH, rounds)):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            for which, call in enumerate((ours, base)):
                events[2 * which].record()
                call(index % 2)
                events[2 * which + 1].record()
            marks.append(events)
        torch.cuda.synchronize()
        for events in marks:
            for which in (0, 1):
                times[which].append(1e3 * events[2 * which].elapsed_time(events[2 * which + 1]))
    return times


def _by_wall_clock(
    ours: Callable[[int], None], base: Callable[[int], None], rounds: int
) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds):
        for which, call in enumerate((ours, base)):
            began = time.perf_counter()
            call(index % 2)
            times[which].append(1e6 * (time.perf_counter() - began))
    return times


def _low(values: list[float]) -> float:
    return sorted(values)[len(values) // 10]


def _high(values: list[float]) -> float:
    return sorted(values)[-1 - len(values) // 10]


if __name__ == "__main__":
    main()
