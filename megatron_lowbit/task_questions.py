"""Questions of zero-shot tasks: read from JSON lines, and as token sequences of which some tokens are scored."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_lowbit.windows import Encoder

MULTIPLE_CHOICE, LAST_WORDS = "multiple choice", "last words"
KEYS = {MULTIPLE_CHOICE: ("query", "choices", "gold"), LAST_WORDS: ("context", "continuation")}
#: Begins the answer's own line, where a query ends in a line break.
ANSWER_PREFIX = "Answer:"
#: of a file's JSON that an error repeats
SHOWN = 60


@dataclass(frozen=True)
class Question:
    """A text and its possible answers, one alone where it is to be predicted; gold: index of the right one."""

    line: int
    prompt: str
    answers: tuple[str, ...]
    gold: int = 0


@dataclass(frozen=True)
class Task:
    """Questions of one kind out of one file. digest: SHA-256 of the file."""

    name: str
    kind: str
    questions: tuple[Question, ...]
    digest: str

    def limited(self, count: int) -> Task:
        """At most `count` questions, evenly spaced over the file."""
        whole = len(self.questions)
        used = min(count, whole)
        return replace(self, questions=tuple(self.questions[index * whole // used] for index in range(used)))


@dataclass(frozen=True)
class ScoredSequence:
    """Tokens of a prompt and one answer to it; those from `first_scored` (at least 1) on are the answer's."""

    question: int
    answer: int
    tokens: tuple[int, ...]
    first_scored: int


def read_task(path: Path) -> Task:
    """A UTF-8 file of JSON lines, all with the keys of one kind in `KEYS`; more keys are ignored, and so are empty
    lines.

    FileNotFoundError where there is no file, ValueError naming file and line where one is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"task file {path} not found; give files of JSON lines")
    data = path.read_bytes()
    kind, questions = "", []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        found, question = _question(line, number, where)
        if kind and found != kind:
            raise ValueError(f"{where}: a question of {found} among those of {kind}; give each kind a file of its own")
        kind = found
        questions.append(question)
    if not questions:
        raise ValueError(f"{path}, line 1: there are no questions; give {_allowed()} on each line")
    return Task(path.stem, kind, tuple(questions), hashlib.sha256(data).hexdigest())


def _allowed() -> str:
    return " or ".join("{" + ", ".join(json.dumps(key) for key in keys) + "}" for keys in KEYS.values())


def _question(line: bytes, number: int, where: str) -> tuple[str, Question]:
    try:
        row = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: not JSON in UTF-8 ({error}); give {_allowed()} on each line") from error
    kinds = [kind for kind, keys in KEYS.items() if isinstance(row, dict) and all(key in row for key in keys)]
    if len(kinds) != 1:
        got = f"keys {sorted(row)}" if isinstance(row, dict) else _shown(row)
        raise ValueError(f"{where}: got {got}; give the keys of one kind, {_allowed()}")
    if kinds[0] == LAST_WORDS:
        return LAST_WORDS, Question(number, _text(row, "context", where), (_text(row, "continuation", where),))
    choices, gold = row["choices"], row["gold"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f'{where}: "choices" is {_shown(choices)}; give a list of at least 2 texts')
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ValueError(f'{where}: "gold" is {_shown(gold)}; give the right choice\'s index, 0 to {len(choices) - 1}')
    texts = {f"choices[{index}]": choice for index, choice in enumerate(choices)}
    answers = tuple(_text(texts, name, where) for name in texts)
    return MULTIPLE_CHOICE, Question(number, _text(row, "query", where), answers, gold)


def _text(row: dict[str, Any], key: str, where: str) -> str:
    text = row[key]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: "{key}" is {_shown(text)}; give a text that is not empty')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f'{where}: "{key}" has a lone surrogate at {error.start}; give valid Unicode') from error
    return text


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def scored_sequences(
    tokenizer: Encoder, task: Task, max_tokens: int, answer_prefix: str = ANSWER_PREFIX
) -> list[ScoredSequence]:
    """A sequence for each answer, in the order of the questions.

    Prompt, one blank and answer are encoded as one text, behind a BOS where the tokenizer adds one: no blank where
    either side has white space there already. A query that ends in a line break asks for an answer on a line of its
    own, which then begins with `answer_prefix`. Scored are the tokens behind those that this text and its prompt have
    in common from the start: all of the answer's, and where a token spans the border, that token too.
    ValueError where a sequence has more than `max_tokens`, or no token before the answer's.
    """
    sequences = []
    for number, question in enumerate(task.questions):
        asks_below = task.kind == MULTIPLE_CHOICE and question.prompt.endswith("\n")
        prompt = question.prompt + (answer_prefix if asks_below else "")
        before = tokenizer.encode(prompt)
        for index, answer in enumerate(question.answers):
            blank = "" if prompt[-1].isspace() or answer[0].isspace() else " "
            tokens = tokenizer.encode(prompt + blank + answer)
            # a prompt without BOS whose only token grows into the answer has nothing to predict that from
            first = max(1, _common(before, tokens))
            where = f"task {task.name}, line {question.line}"
            if first >= len(tokens):
                raise ValueError(f"{where}: {prompt + blank + answer!r} is a single token; give a longer text")
            if len(tokens) > max_tokens:
                raise ValueError(
                    f"{where}: {len(tokens)} tokens, the model takes up to {max_tokens}; leave the question out"
                )
            sequences.append(ScoredSequence(number, index, tuple(tokens), first))
    return sequences


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens are equal from the start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))
