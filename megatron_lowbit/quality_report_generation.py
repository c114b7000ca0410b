"""Long greedy continuations beside those of the exact sum: when they part ways, and whether they repeat themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from megatron_lowbit.calibration.artifact import CommCalibration
from megatron_lowbit.comm.schemes import CommScheme
from megatron_lowbit.generate import TokenGeneration
from megatron_lowbit.sampling import SamplingParams
from megatron_lowbit.weights import ModelWeights

#: Tokens in a row that count as repeated where the same ones stood before.
REPEATED = 4


def continuations(
    weights: ModelWeights,
    scheme: CommScheme,
    calibration: CommCalibration | None,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    end_tokens: Collection[int],
    progress: Callable[[], None],
    backend: str = "auto",
) -> list[list[int]]:
    """Greedy tokens of each prompt, up to the first end token, which is kept; the scheme at every message size.

    All prompts run to the end side by side: schemes then meet the same shapes, and products round alike.
    """
    model = weights.build_with_scheme(scheme, calibration, backend)
    generation = TokenGeneration(model, prompts, SamplingParams(max_new_tokens=new_tokens))
    written: list[list[int]] = [[] for _ in prompts]
    for _ in range(new_tokens):
        for prompt, token in generation.step().items():
            written[prompt].append(token)
        progress()
    return [_until_end(tokens, end_tokens) for tokens in written]


def generation_row(
    scheme: str, exact: Sequence[Sequence[int]], found: Sequence[Sequence[int]], new_tokens: int
) -> dict[str, object]:
    """`diverged_at`: for each prompt the first new token that differs, counted from 0, None where none does.

    `median_diverged_at`: None where at least half never differ. `repetition`: mean share of 4-grams of a continuation
    that stood in it before, `exact_repetition` of the exact ones.
    """
    diverged = [first_difference(one, other) for one, other in zip(exact, found, strict=True)]
    ordered = sorted(diverged, key=lambda at: new_tokens if at is None else at)
    return {
        "part": "generation",
        "scheme": scheme,
        "prompts": len(diverged),
        "new_tokens": new_tokens,
        "diverged_at": diverged,
        "median_diverged_at": ordered[(len(ordered) - 1) // 2],
        "same_to_the_end": sum(at is None for at in diverged) / len(diverged),
        "repetition": sum(map(repetition, found)) / len(found),
        "exact_repetition": sum(map(repetition, exact)) / len(exact),
    }


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs, the end of the shorter one included; None for equal ones."""
    if list(one) == list(other):
        return None
    pairs = zip(one, other, strict=False)
    return next((at for at, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


def repetition(tokens: Sequence[int]) -> float:
    """Share of runs of 4 tokens that occurred before; 0 for texts too short to have any."""
    grams = [tuple(tokens[at : at + REPEATED]) for at in range(len(tokens) - REPEATED + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _until_end(tokens: list[int], end_tokens: Collection[int]) -> list[int]:
    end = next((at for at, token in enumerate(tokens) if token in end_tokens), len(tokens))
    return tokens[: end + 1]
