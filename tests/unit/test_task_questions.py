"""Files of questions, what is wrong with bad ones, and which tokens of a question are scored."""

from __future__ import annotations

import json

import pytest
from helpers.task_cases import CHOICES, WORDS, Characters, write_lines

from megatron_lowbit.task_questions import LAST_WORDS, MULTIPLE_CHOICE, read_task, scored_sequences


class Words:
    """Tokens are words with the blank before them, as byte-level tokenizers cut, and `'s` grows onto its word."""

    adds_bos, bos_id = False, None

    def __init__(self) -> None:
        self.known: list[str] = []

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        pieces = [piece if index == 0 else " " + piece for index, piece in enumerate(text.split(" ")) if piece]
        pieces += [" "] if text.endswith(" ") else []
        self.known += [piece for piece in pieces if piece not in self.known]
        return [self.known.index(piece) for piece in pieces]

    def scored(self, task, **options) -> list[list[str]]:
        found = scored_sequences(self, task, 100, **options)
        return [[self.known[token] for token in one.tokens[one.first_scored :]] for one in found]


def task_of(tmp_path, *rows):
    return read_task(write_lines(tmp_path / "some.jsonl", rows))


def test_both_kinds_are_told_by_their_keys(tmp_path):
    task = task_of(tmp_path, *CHOICES)
    assert (task.name, task.kind, len(task.questions)) == ("some", MULTIPLE_CHOICE, len(CHOICES))
    assert task.questions[3].answers == ("a key", "a pot", "an owl") and task.questions[3].gold == 1
    (tmp_path / "some.jsonl").write_text("\n" + json.dumps({**WORDS[0], "source": "here"}) + "\r\n\n")
    words = read_task(tmp_path / "some.jsonl")
    assert words.kind == LAST_WORDS and words.questions[0].line == 2 and words.digest != task.digest
    assert (words.questions[0].prompt, words.questions[0].answers) == (WORDS[0]["context"], ("hat g",))


def test_a_limit_takes_questions_from_all_over_the_file(tmp_path):
    task = task_of(tmp_path, *CHOICES)
    assert [question.line for question in task.limited(4).questions] == [1, 4, 8, 12]
    assert task.limited(99) == task


GOOD = json.dumps(CHOICES[0]).encode()
BAD = {
    b"": "line 1: there are no questions",
    GOOD + b"\nnonsense": "line 2: not JSON in UTF-8",
    b'{"query": "\xff"}': "line 1: not JSON in UTF-8",
    GOOD + b"\n\n[1, 2]": "line 3: got [1, 2]; give the keys of one kind",
    b'{"query": "q", "choices": ["a", "b"]}': "line 1: got keys ['choices', 'query']; give the keys",
    json.dumps(CHOICES[0] | WORDS[0]).encode(): "give the keys of one kind",
    GOOD + b"\n" + json.dumps(WORDS[0]).encode(): "line 2: a question of last words among those of multiple choice",
    b'{"query": "q", "choices": ["a"], "gold": 0}': "at least 2 texts",
    b'{"query": "q", "choices": "ab", "gold": 0}': '"choices" is "ab"',
    b'{"query": "q", "choices": ["a", 7], "gold": 0}': '"choices[1]" is 7',
    b'{"query": "q", "choices": ["a", " "], "gold": 0}': '"choices[1]" is " "',
    b'{"query": "", "choices": ["a", "b"], "gold": 0}': '"query" is ""',
    b'{"query": "q", "choices": ["a", "b"], "gold": 2}': '"gold" is 2; give the right choice\'s index, 0 to 1',
    b'{"query": "q", "choices": ["a", "b"], "gold": true}': '"gold" is true',
    b'{"query": "q", "choices": ["a", "b"], "gold": "b"}': '"gold" is "b"',
    b'{"context": "a", "continuation": null}': '"continuation" is null',
    b'{"context": "a\\ud800", "continuation": "b"}': '"context" has a lone surrogate at 1',
}


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_a_bad_file_costs_one_line_with_its_name_and_the_line(tmp_path, content):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_task(path)
    assert BAD[content] in str(raised.value)
    assert str(raised.value).startswith(f"{path}, line ") and "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl not found"):
        read_task(tmp_path / "nowhere.jsonl")


def test_answers_are_joined_by_one_blank_and_all_of_their_tokens_are_scored(tmp_path):
    def last(context, continuation, **options):
        return Words().scored(task_of(tmp_path, {"context": context, "continuation": continuation}), **options)[0]

    assert last("they found", "a key") == [" a", " key"]
    assert last("they found", " a key") == [" a", " key"]
    assert last("they found ", "a key") == [" a", " key"]  # the prompt's last blank is part of the answer's token
    assert last("they found", "\ta key") == [" found\ta", " key"]  # a token over the border is scored as a whole
    assert last("Say what?\n", "a key") == [" what?\na", " key"]  # the text goes on


def test_a_query_that_ends_in_a_line_break_gets_a_line_for_its_answer(tmp_path):
    task = task_of(tmp_path, {"query": "Say what?\n", "choices": ["a", "a key"], "gold": 1})
    words = Words()
    found = scored_sequences(words, task, 100)
    assert [words.known[token] for token in found[1].tokens] == ["Say", " what?\nAnswer:", " a", " key"]
    assert words.scored(task) == [[" a"], [" a", " key"]]
    assert words.scored(task, answer_prefix="") == [[" what?\na"], [" what?\na", " key"]]


def test_a_bos_comes_first_and_choices_follow_one_another(tmp_path):
    found = scored_sequences(Characters(200), task_of(tmp_path, *CHOICES[:2]), 100)
    assert [(one.question, one.answer) for one in found] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    text = "In the garden they found"
    assert found[1].tokens == (1, *map(ord, text + " a pot")) and found[1].first_scored == 1 + len(text)


def test_sequences_that_no_model_can_score_are_refused(tmp_path):
    task = task_of(tmp_path, *WORDS)
    longest = max(len(one.tokens) for one in scored_sequences(Characters(200), task, 1000))
    with pytest.raises(ValueError, match=rf"task some, line 4: {longest} tokens, the model takes up to {longest - 1}"):
        scored_sequences(Characters(200), task, longest - 1)
    with pytest.raises(ValueError, match=r"line 1: 'found\\ta' is a single token"):
        scored_sequences(Words(), task_of(tmp_path, {"context": "found", "continuation": "\ta"}), 100)
