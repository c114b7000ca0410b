"""What each step of the codec costs beside copying, on one thread of one rank: all steps take turns.

    python benchmarks/codec_ratios.py [--tokens 1024] [--hidden 4096] [--json FILE]

Ratios are medians of the ratios within a round. encode, decode, decode_add: to copying the bf16 values. decode_sum and
requantize: to copying as many bytes as the FP32 sum has plus copying the packets (which reads them and writes as much).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lowbit_kernels import get_backend
from lowbit_tools import output
from megatron_lowbit.calibration.artifact import SyncPointStatistics
from megatron_lowbit.calibration.observer import RangeObserver
from megatron_lowbit.calibration.outliers import constants_from_statistics
from megatron_lowbit.comm.codec import Codec
from megatron_lowbit.comm.constants import SyncPointConstants
from megatron_lowbit.comm.schemes import CommScheme, parse_scheme
from megatron_lowbit.parallel import ParallelContext

RANKS = 4
ROUNDS = 41
FORMATS = (
    "int4-outlier", "int4", "int8", "int4-g64", "int4-g64-asym", "int4-g64-prescaled", "int8-g128", "int3-g64",
    "int5-g64", "fp8-g128", "fp4-g32", "mxfp4", "nvfp4", "bf16",
)  # fmt: skip
STEPS = ("encode", "decode", "decode_add", "decode_sum", "requantize")


def constants(scheme: CommScheme, values_RTH: torch.Tensor) -> SyncPointConstants:
    """Static constants as a calibration over the very values would give them."""
    partial, total = RangeObserver(), RangeObserver()
    partial.update(values_RTH.float())
    total.update(values_RTH.float().sum(0, keepdim=True))
    assert partial.minimum is not None and partial.maximum is not None
    assert total.minimum is not None and total.maximum is not None
    point = SyncPointStatistics(partial.minimum, partial.maximum, total.minimum[0], total.maximum[0])
    return constants_from_statistics(scheme, "codec", point)


def calls(name: str, values_RTH: torch.Tensor) -> dict[str, Callable[[], object]]:
    scheme = parse_scheme(name)
    fixed = constants(scheme, values_RTH)
    index = (fixed.body_index, fixed.outlier_index)
    backend = get_backend("auto")
    hidden = values_RTH.shape[2]
    reduce = Codec(
        scheme.reduce_stage, hidden, backend, *index, fixed.reduce_scale_RD, minimum_RD=fixed.reduce_minimum_RD
    )
    assert scheme.gather_stage is not None
    gather = Codec(
        scheme.gather_stage, hidden, backend, *index, fixed.gather_scale_1D, minimum_RD=fixed.gather_minimum_1D
    )
    packets = [reduce.encode(values_TH, rank) for rank, values_TH in enumerate(values_RTH)]
    sum_TH = reduce.decode_sum(packets)
    packet_TB = gather.encode(sum_TH, 0)
    stacked = torch.stack(packets)
    scratch, wide = torch.empty_like(stacked), torch.empty_like(sum_TH)
    target = torch.empty_like(values_RTH[0])
    return {
        "copy": lambda: target.copy_(values_RTH[0]),
        "copy sum and packets": lambda: (wide.copy_(sum_TH), scratch.copy_(stacked)),
        "encode": lambda: reduce.encode(values_RTH[0], 0, packets[0]),
        "decode": lambda: gather.decode(packet_TB, 0, wide),
        "decode_add": lambda: gather.decode(packet_TB, 0, wide, add=True),
        "decode_sum": lambda: reduce.decode_sum(packets, wide),
        "requantize": lambda: reduce.requantize(packets, gather, packet_TB),
    }


def measure(steps: dict[str, Callable[[], object]], loops: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS + 3):
        for name, call in steps.items():
            began = time.perf_counter()
            for _ in range(loops):
                call()
            if turn >= 3:
                times[name].append((time.perf_counter() - began) / loops)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    values_RTH = torch.randn(RANKS, args.tokens, args.hidden, generator=generator).bfloat16()
    rows: list[dict[str, object]] = []
    for name in FORMATS:
        times = measure(calls(name, values_RTH), max(1, 512 // args.tokens))
        row: dict[str, object] = {"format": name, "copy_us": statistics.median(times["copy"]) * 1e6}
        for step in STEPS:
            base = times["copy" if step in STEPS[:3] else "copy sum and packets"]
            row[f"{step}_us"] = statistics.median(times[step]) * 1e6
            row[f"{step}_ratio"] = statistics.median(t / b for t, b in zip(times[step], base, strict=True))
        rows.append(row)
    context = ParallelContext.single()
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {"format": lambda row: str(row["format"])}
    for step in STEPS:
        columns[step] = lambda row, step=step: f"{row[f'{step}_ratio']:.2f}x ({row[f'{step}_us']:.0f} us)"  # type: ignore[misc]
    title = f"[{args.tokens}, {args.hidden}] bf16, one thread, {ROUNDS} rounds in turn"
    output.console().print(output.table(title, rows, columns, "ratios to copying, medians"))
    output.write_json(args.json, context, output.conditions(context, tokens=args.tokens, hidden=args.hidden), rows)


if __name__ == "__main__":
    main()
