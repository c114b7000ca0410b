"""verify: whether a checkpoint is whole, holds the values of another, and computes what transformers computes."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints_conv.export import export
from checkpoints_conv.row_blocks import row_blocks
from checkpoints_conv.source import open_source, short_name, stored_dtype
from megatron_lowbit.checkpoint.huggingface import HuggingFaceCheckpoint
from megatron_lowbit.checkpoint.manifest import DTYPES, Progress
from megatron_lowbit.checkpoint.reader import CheckpointReader, check_complete
from megatron_lowbit.checkpoint.tensor_parallel import TensorParallelCheckpoint
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.layers.kv_cache import TokenBatch
from megatron_lowbit.models.registry import tensor_sources
from megatron_lowbit.parallel import ParallelContext
from megatron_lowbit.weights import load_weights

# both compute in FP32, in different orders: some 1e-6 of the largest logit; a row in the wrong place moves all of them
LOGIT_TOLERANCE = 1e-4
LOGIT_TOKENS = 48
BYTES_AS_INTEGERS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Verification:
    """What was found right. hashed_files: 0 for formats without sums. The others are None where nobody asked.

    compared_tensors: equal bit for bit, after rounding to this checkpoint's type. logit_difference: the largest one,
    of logits up to `largest_logit`.
    """

    tensors: int
    hashed_files: int
    compared_tensors: int | None = None
    logit_difference: float | None = None
    largest_logit: float | None = None


def verify(
    path: Path, against: Path | None = None, logits: bool = False, progress: Progress | None = None
) -> Verification:
    """Checks that every tensor is there with its shape, and every file has the recorded SHA-256.

    against: anything `convert` reads; every value is compared with it. logits: FP32 logits of LOGIT_TOKENS random
    tokens are compared with transformers', which loads `against`, or else an export of `path` made for it; needs
    transformers, and memory for the model twice. Raises ValueError or FileNotFoundError for whatever is not right.
    """
    reader = open_source(path)
    sources = tensor_sources(reader.config)
    check_complete(reader, sources)
    hashed = 0
    if isinstance(reader, TensorParallelCheckpoint):
        reader.verify_hashes(progress if against is None else None)
        hashed = len(reader.manifest.files)
    compared = None
    if against is not None:
        compared = _compare(reader, open_source(against), progress)
    if not logits:
        return Verification(len(sources), hashed, compared)
    if against is not None:
        difference, largest = _compare_logits(path, against, stored_dtype(reader, sources))
    else:
        with tempfile.TemporaryDirectory() as folder:
            export(path, Path(folder) / "exported")
            difference, largest = _compare_logits(path, Path(folder) / "exported", stored_dtype(reader, sources))
    return Verification(len(sources), hashed, compared, difference, largest)


def _compare(mine: CheckpointReader, theirs: CheckpointReader, progress: Progress | None) -> int:
    sources = tensor_sources(mine.config)
    check_complete(theirs, sources)
    total = sum(math.prod(source.shape) * mine.dtype(name).itemsize for name, source in sources.items())
    done = 0
    for name in sources:
        dtype = mine.dtype(name)
        if dtype not in DTYPES.values():
            raise ValueError(f"{mine.directory}: {name} is {short_name(dtype)}; compared are {', '.join(DTYPES)}")
        integer = BYTES_AS_INTEGERS[dtype.itemsize]
        for first_row, expected in row_blocks(theirs, name, dtype):
            found = mine.read_span(name, 0, first_row, first_row + expected.shape[0])
            wrong = int((found.view(integer) != expected.view(integer)).sum())
            if wrong:
                raise ValueError(
                    f"{mine.directory}: {wrong} values of tensor {name} from row {first_row} on differ from those of "
                    f"{theirs.directory} in {short_name(dtype)}; it was converted from other weights, convert again"
                )
            done += found.numel() * dtype.itemsize
            if progress is not None:
                progress(done, total)
    return len(sources)


def _compare_logits(path: Path, hf_folder: Path, dtype: torch.dtype) -> tuple[float, float]:
    """(largest difference, largest logit) of FP32 computations with the weights in `dtype`."""
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("logits are compared with transformers, which is not installed; pip install transformers")
    if not isinstance(open_source(hf_folder), HuggingFaceCheckpoint):
        raise ValueError(f"{hf_folder}: not a Hugging Face folder, which transformers could load; give one to compare")
    weights = load_weights(path, ParallelContext.single(), torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, weights.config.vocab_size, (LOGIT_TOKENS,), generator=generator)
    model = weights.build_with_scheme(parse_scheme("exact"))
    batch = TokenBatch.prompts([tokens.tolist()[: weights.config.max_position]], torch.device("cpu"))
    found_TV = model.head.precise_logits(model(batch))
    expected_TV = _transformers_logits(hf_folder, batch.tokens_T, dtype)
    largest = float(expected_TV.abs().max())
    difference = float((found_TV - expected_TV).abs().max())
    if not difference <= LOGIT_TOLERANCE * max(1.0, largest):
        raise ValueError(
            f"{path}: logits differ from transformers' by up to {difference:.3g} where they reach {largest:.3g}; "
            f"expected at most {LOGIT_TOLERANCE:g} of that. Compare the weights (--against), and report this where "
            "they are equal"
        )
    return difference, largest


@torch.inference_mode()
def _transformers_logits(folder: Path, tokens_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """FP32 `[T, V]`, of weights rounded to `dtype`."""
    from transformers import AutoModelForCausalLM, __version__

    newer = tuple(map(int, __version__.split(".")[:2])) >= (4, 56)
    kind = {"dtype" if newer else "torch_dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **kind).eval()
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    logits: torch.Tensor = model(tokens_T[None]).logits[0].float()
    return logits
