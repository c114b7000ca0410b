"""What tests of whole models compute, in this process or (as cases of a RankGroup) on every rank."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from megatron_lowbit.calibration.artifact import STATISTICS, CommCalibration
from megatron_lowbit.calibration_run import calibrate
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.evaluation import evaluate
from megatron_lowbit.generate import TokenGeneration
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.parallel import ParallelContext, RankError
from megatron_lowbit.sampling import SamplingParams
from megatron_lowbit.weights import DTYPES, ModelWeights, load_weights


def prompt_of(vocab_size: int, length: int, start: int = 3) -> list[int]:
    """Token ids without a short period, the same everywhere."""
    return [(7 * position * position + start) % vocab_size for position in range(length)]


def logits_of(
    weights: ModelWeights, prompt: list[int], scheme: str = "exact", calibration: CommCalibration | None = None
) -> torch.Tensor:
    """FP32 `[T, V']` of every position."""
    model = weights.build_with_scheme(parse_scheme(scheme), calibration)
    return model.head.precise_logits(model(TokenBatch.prompts([prompt], weights.context.device)))


def generate(
    weights: ModelWeights,
    prompts: list[list[int]],
    params: SamplingParams,
    scheme: str = "exact",
    calibration: CommCalibration | None = None,
) -> list[list[int]]:
    """`max_new_tokens` new tokens of each prompt, all side by side; end tokens mean nothing here."""
    model = weights.build_with_scheme(parse_scheme(scheme), calibration)
    generation = TokenGeneration(model, prompts, params)
    tokens: list[list[int]] = [[] for _ in prompts]
    for _ in range(params.max_new_tokens):
        for sequence, token in generation.step().items():
            tokens[sequence].append(token)
    return tokens


def rank_logits(
    context: ParallelContext, path: str, prompt: list[int], schemes: list[str], dtype: str = "fp32",
    calibration: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Hidden states and this rank's logits of each scheme."""
    weights = load_weights(Path(path), context, DTYPES[dtype])
    ranges = None if calibration is None else CommCalibration.load(Path(calibration))
    results = {}
    for scheme in schemes:
        model = weights.build_with_scheme(parse_scheme(scheme), ranges)
        hidden_TH = model(TokenBatch.prompts([prompt], context.device))
        results[f"{scheme}.hidden"] = hidden_TH
        results[f"{scheme}.logits"] = model.head.precise_logits(hidden_TH)
    return results


def rank_generate(
    context: ParallelContext, path: str, prompts: list[list[int]], params: dict[str, Any], scheme: str = "exact"
) -> dict[str, Any]:
    weights = load_weights(Path(path), context, torch.float32)
    return {"tokens": generate(weights, prompts, SamplingParams(**params), scheme)}


def rank_calibrate(context: ParallelContext, path: str, sequences: list[list[int]]) -> dict[str, Any]:
    found = calibrate(load_weights(Path(path), context, torch.float32), sequences, "0" * 64)
    tensors = {
        f"{name}.{statistic}": getattr(point, statistic)
        for name, point in found.sync_points.items()
        for statistic in STATISTICS
    }
    return {"tp": found.tp, "sequences": found.sequences, "fingerprint": found.fingerprint, **tensors}


def rank_evaluate(
    context: ParallelContext, path: str, calibration: str, schemes: list[str], windows: list[list[int]]
) -> dict[str, Any]:
    weights = load_weights(Path(path), context, torch.float32)
    rows = evaluate(weights, schemes, windows, CommCalibration.load(Path(calibration)))
    return {"rows": [vars(row) for row in rows]}


def rank_load_errors(context: ParallelContext, paths: list[str]) -> dict[str, Any]:
    """What loading says, where each rank may have a copy of its own, and how long it takes to say it."""
    began = time.monotonic()
    try:
        load_weights(Path(paths[context.rank % len(paths)]), context)
    except RankError as error:
        message = str(error)
    else:
        message = ""
    return {"message": message, "seconds": time.monotonic() - began}


def rank_build_errors(
    context: ParallelContext, path: str, calibrations: list[str], schemes: list[str]
) -> dict[str, Any]:
    """What building a model says, where each rank may have a calibration and a scheme of its own."""
    weights = load_weights(Path(path), context)
    calibration = CommCalibration.load(Path(calibrations[context.rank % len(calibrations)]))
    try:
        weights.build_with_scheme(parse_scheme(schemes[context.rank % len(schemes)]), calibration)
    except RankError as error:
        return {"message": str(error)}
    return {"message": ""}
