"""Training-free tensor-parallel LLM inference whose all-reduces travel at about 4 bits a value (arXiv 2411.07942).

The public names below are imported when they are first used: the method itself (`megatron_lowbit.comm.reference`) can
be read and run without processes, models or a command line.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_lowbit.calibration.artifact import CommCalibration
    from megatron_lowbit.calibration_run import calibrate
    from megatron_lowbit.comm.schemes import SCHEMES, CommScheme, parse_scheme
    from megatron_lowbit.evaluation import EvaluationRow, evaluate
    from megatron_lowbit.llm import LLM, Completion, TextEvent
    from megatron_lowbit.parallel import CommunicationError, ParallelContext, RankError
    from megatron_lowbit.sampling import SamplingParams
    from megatron_lowbit.task_evaluation import TaskRow, evaluate_tasks
    from megatron_lowbit.task_questions import read_task
    from megatron_lowbit.tokenizer import Tokenizer
    from megatron_lowbit.weights import ModelWeights, load_weights
    from megatron_lowbit.windows import text_windows

_HOME = {
    "LLM": "llm",
    "SCHEMES": "comm.schemes",
    "CommCalibration": "calibration.artifact",
    "CommScheme": "comm.schemes",
    "CommunicationError": "parallel",
    "Completion": "llm",
    "EvaluationRow": "evaluation",
    "ModelWeights": "weights",
    "ParallelContext": "parallel",
    "RankError": "parallel",
    "SamplingParams": "sampling",
    "TaskRow": "task_evaluation",
    "TextEvent": "llm",
    "Tokenizer": "tokenizer",
    "calibrate": "calibration_run",
    "evaluate": "evaluation",
    "evaluate_tasks": "task_evaluation",
    "load_weights": "weights",
    "parse_scheme": "comm.schemes",
    "read_task": "task_questions",
    "text_windows": "windows",
}

__all__ = [
    "LLM",
    "SCHEMES",
    "CommCalibration",
    "CommScheme",
    "CommunicationError",
    "Completion",
    "EvaluationRow",
    "ModelWeights",
    "ParallelContext",
    "RankError",
    "SamplingParams",
    "TaskRow",
    "TextEvent",
    "Tokenizer",
    "calibrate",
    "evaluate",
    "evaluate_tasks",
    "load_weights",
    "parse_scheme",
    "read_task",
    "text_windows",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
