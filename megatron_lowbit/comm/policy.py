"""Policy: which collective carries a message of which size, by a table that is fixed when a model is built."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_lowbit.comm.exchange import AUTOMATIC
from megatron_lowbit.files import replacing
from megatron_lowbit.parallel import ParallelContext

logger = logging.getLogger(__name__)

#: `exact`: the partials as they are, to everybody in one stage; the two others carry the scheme's packets.
Collective = Literal["exact", "one-stage", "two-stage"]
COLLECTIVES: tuple[str, ...] = get_args(Collective)
VERSION = 1
#: A piece size that no message reaches: messages are not cut.
WHOLE = 1 << 40


@dataclass(frozen=True)
class Choice:
    """A collective and, for two stages, the packet bytes of a piece (AUTOMATIC: by the size of the message)."""

    collective: Collective
    piece_nbytes: int = AUTOMATIC

    def __post_init__(self) -> None:
        if self.collective not in COLLECTIVES:
            raise ValueError(f"policy: collective {self.collective!r} is unknown; allowed: {', '.join(COLLECTIVES)}")
        if type(self.piece_nbytes) is not int or self.piece_nbytes < 0:
            raise ValueError(f"policy: piece_nbytes is {self.piece_nbytes!r}; give a whole number (0: automatic)")

    @property
    def name(self) -> str:
        if self.collective != "two-stage" or self.piece_nbytes == AUTOMATIC:
            return self.collective
        if self.piece_nbytes >= WHOLE:
            return "two-stage in one piece"
        return f"two-stage in pieces of {self.piece_nbytes >> 10} KiB"


@dataclass(frozen=True)
class Policy:
    """Choices by message size, in bytes of the message as 16-bit values (2 x tokens x hidden).

    steps: (largest size, choice), ascending; beyond the last size the last choice holds.
    """

    steps: tuple[tuple[int, Choice], ...]
    source: str = "defaults"

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.steps]
        if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 0:
            raise ValueError(f"policy: sizes {sizes} must be at least one, not negative, and ascending")

    def choose(self, tokens: int, hidden: int) -> Choice:
        nbytes = 2 * tokens * hidden
        return next((choice for size, choice in self.steps if nbytes <= size), self.steps[-1][1])

    def to_json(self) -> dict[str, Any]:
        rows = [
            {"largest_nbytes": size, "collective": choice.collective, "piece_nbytes": choice.piece_nbytes}
            for size, choice in self.steps
        ]
        return {"version": VERSION, "steps": rows}


def default_policy(ranks: int) -> Policy:
    """What serves most links where nothing was measured.

    A message that fits a few network packets costs its latency and nothing else: it goes exactly, in one stage. One
    stage moves (R-1)/2 times the bytes of two, which pays while latency outweighs them.
    """
    if ranks < 2:  # nothing travels
        return Policy(((1 << 62, Choice("exact")),))
    exact = 24 << 10
    one_stage = exact if ranks > 4 else (256 << 10) // (ranks - 1)
    steps = [(exact // (ranks - 1), Choice("exact"))]
    if one_stage > steps[0][0]:
        steps.append((one_stage, Choice("one-stage")))
    return Policy((*steps, (1 << 62, Choice("two-stage"))))


def policy_from_json(data: Any, source: str) -> Policy:
    """ValueError, naming `source` and what is wrong, for anything that `to_json` would not have written."""
    if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("steps"), list):
        raise ValueError(f"{source}: not a policy of version {VERSION}; make one with `megatron-lowbit tune OUT.json`")
    steps = []
    for row in data["steps"]:
        known = {"largest_nbytes", "collective", "piece_nbytes"}
        if not isinstance(row, dict) or set(row) != known or type(row["largest_nbytes"]) is not int:
            raise ValueError(f"{source}: step {row!r}; each needs exactly {', '.join(sorted(known))}")
        try:
            steps.append((row["largest_nbytes"], Choice(row["collective"], row["piece_nbytes"])))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    try:
        return Policy(tuple(steps), source)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def load_policy(path: Path) -> Policy:
    """A policy from a file of `megatron-lowbit tune`. ValueError where it is not one."""
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable policy file ({error})") from error
    return policy_from_json(data, str(path))


def shared_policy(context: ParallelContext, policy: str | Path | Policy | None) -> Policy | None:
    """The policy that all ranks use: "auto" for the defaults, a file (rank 0's, sent to all), one given, or None.

    Raises ValueError (RankError on several ranks) for a file that is not one.
    """
    if policy is None or isinstance(policy, Policy):
        return policy
    if policy == "auto":
        return default_policy(context.size)
    data = context.together(lambda: load_policy(Path(policy)).to_json() if context.is_first else None)
    return policy_from_json(context.broadcast_json(data), str(policy))


def save_policy(policy: Policy, path: Path, conditions: dict[str, Any]) -> None:
    """Writes the policy beside what it was measured under, as a whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(policy.to_json() | {"conditions": conditions}, indent=1) + "\n")


@dataclass
class PolicyLog:
    """How often each choice was taken; says so in the log the first time for a size class (a power of two)."""

    counts: dict[str, int] = field(default_factory=dict)
    _said: set[tuple[int, str]] = field(default_factory=set)

    def add(self, choice: Choice, tokens: int, hidden: int) -> None:
        name = choice.name
        self.counts[name] = self.counts.get(name, 0) + 1
        size_class = (2 * tokens * hidden).bit_length()
        if (size_class, name) not in self._said:
            self._said.add((size_class, name))
            logger.info("messages of up to %d bytes (16-bit): %s", (1 << size_class) - 1, name)
