"""Tekken files: the same ids as merging bytes by rank, with nothing but the file to go by."""

from __future__ import annotations

import base64
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lowbit.tokenizer import Tokenizer
from megatron_lowbit.tokenizer_tekken import merges_of, tekken_as_json

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog, 1234567890 times. It doesn't STOP; it's what theY'll do!\n"
    "def main(x):\n    return x ** 2  # squares\n日本語のテキスト、漢字とかな。 Ünïcödé naïve café. aaaaaaaa banana\n"
)
HARD_TEXTS = [
    "", " ", "     ", "  leading", "trailing  ", " " * 5000, "many    spaces\t\tand\ttabs\n\n\nlines\r\n/",
    "😀😃👨‍👩‍👧‍👦🏳️‍🌈 emoji", "日本語、中文、한국어, हिन्दी, עברית, العربية \u202eabc", "\x00NUL\x00\x01\x02\x1b[0m\x7f",
    "zzqq", "x" * 5000, "ab" * 3000, "1234567890" * 20, "e\u0301 vs é, \ufeffBOM, \u200bzero\u200dwidth, \ufffd",
    "<s>[INST] names of specials [/INST]</s><unk><SPECIAL_22>", CORPUS,
]  # fmt: skip
RESERVED = 24


def learned(corpus: str, count: int) -> list[bytes]:
    """Tokens by rank, learned in the plainest way: the pair of neighbours that is most frequent becomes a token."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = [[bytes([byte]) for byte in word.encode()] for word in re.findall(r" ?\w+|\W", corpus)]
    while len(tokens) < count:
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in itertools.pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if best[0] + best[1] not in tokens:
            tokens.append(best[0] + best[1])
        words = [joined(word, best) for word in words]
    return tokens


def joined(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    result: list[bytes] = []
    for piece in word:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def by_rank(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule, written down plainly: join the left one of the neighbours whose join has the lowest rank."""
    if word in ranks:
        return [ranks[word]]
    pieces = [word[i : i + 1] for i in range(len(word))]
    while True:
        joins = [(ranks.get(a + b, 1 << 40), i) for i, (a, b) in enumerate(itertools.pairwise(pieces))]
        rank, place = min(joins, default=(1 << 40, 0))
        if rank == 1 << 40:
            return [ranks[piece] for piece in pieces]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def expected_ids(text: str, tokens: list[bytes], pattern: str) -> list[int]:
    splitter = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    words = [word for word, _ in splitter.pre_tokenize_str(text)] if text else []
    return [RESERVED + rank for word in words for rank in by_rank(word.encode(), ranks)]


def tekken(tokens: list[bytes], **changes: Any) -> dict[str, Any]:
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    config = {
        "pattern": PATTERN, "num_vocab_tokens": len(tokens), "default_vocab_size": RESERVED + len(tokens) - 3,
        "default_num_special_tokens": RESERVED, "version": "v3",
    }  # fmt: skip
    return {"config": {**config, **changes.pop("config", {})}, "vocab": vocab, **changes}


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    """One of them is a word that no merges make: such a word is the token all the same."""
    return [*learned(CORPUS, 330), b"zzqq", *learned(CORPUS, 360)[330:359]]


@pytest.fixture(scope="module")
def directory(tokens: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tekken")
    (path / "tekken.json").write_text(json.dumps(tekken(tokens)))
    return path


@pytest.fixture(scope="module")
def loaded(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory)


def test_equals_merging_by_rank(directory: Path, tokens: list[bytes]) -> None:
    ours = Tokenizer.from_directory(directory)
    used = tokens[:-3]  # the file lists more tokens than its vocabulary takes
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids, ours.adds_bos) == (RESERVED + len(used), 1, (2,), True)
    picker = random.Random(0)
    texts = ["".join(picker.choices(CORPUS + " \x00😀aab", k=60)) for _ in range(200)]
    for text in [*HARD_TEXTS, *texts]:
        ids = expected_ids(text, used, PATTERN) if len(text) < 4000 else ours.encode(text)[1:]
        assert ours.encode(text) == [1, *ids]
        assert ours.decode(ids) == text
        assert all(token_id >= RESERVED for token_id in ids)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text(loaded: Tokenizer, tokens: list[bytes], text: str) -> None:
    assert loaded.encode(text, add_bos=False) == expected_ids(text, tokens[:-3], PATTERN)
    assert loaded.decode(loaded.encode(text)) == text


def test_special_names_are_text_unless_asked(directory: Path) -> None:
    ours = Tokenizer.from_directory(directory)
    text = "<s>[INST]fox[/INST]<SPECIAL_23></s>"
    assert ours.encode(text, add_bos=False, parse_special=True) == [1, 3, *ours.encode("fox", False), 4, 23, 2]
    plain = ours.encode(text, add_bos=False)
    assert min(plain) >= RESERVED and ours.decode(plain) == text
    assert ours.decode([1, *plain, 2]) == text and ours.decode([1, 2], skip_special=False) == "<s></s>"


def test_transformers_reads_the_same(directory: Path, tokens: list[bytes], tmp_path: Path) -> None:
    path = directory / "tekken.json"
    (tmp_path / "tokenizer.json").write_text(tekken_as_json(path.read_text(), path))
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_directory(directory)
    for text in HARD_TEXTS:
        assert oracle(text).input_ids == ours.encode(text, parse_special=True)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab", min_size=2, max_size=6), unique=True, max_size=12), st.text("ab", min_size=1, max_size=24)
)
def test_merge_order_under_ties(joins: list[str], word: str) -> None:
    """Two letters only, so that joins overlap all the time. tiktoken takes the left of two equal joins,
    `tokenizers` the one that is listed first. Every token but a letter is made of two others, as in real files."""
    tokens = [b"a", b"b"]
    for join in sorted(joins, key=len):
        token = join.encode()
        if any(token[:cut] in tokens and token[cut:] in tokens for cut in range(1, len(token))):
            tokens.append(token)
    names = [token.decode() for token in tokens]
    merges = [(names[left], names[right]) for left, right in merges_of(tokens)]
    model = tokenizers.models.BPE({name: rank for rank, name in enumerate(names)}, merges, ignore_merges=True)
    ids = [token.id for token in model.tokenize(word)]
    assert ids == by_rank(word.encode(), {token: rank for rank, token in enumerate(tokens)})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"config": {"version": "v11"}}, "'v11' without special_tokens"),
        ({"config": {"pattern": None}}, "pattern None"),
        ({"config": {"default_num_special_tokens": 5}}, "20 special tokens where 5 ids"),
        ({"config": {"default_vocab_size": 5000}}, "rank 360 is missing"),
        ({"vocab": [{"rank": 0, "token_bytes": "?"}]}, "not a readable Tekken file"),
        ({"special_tokens": [{"rank": 1, "token_str": "<s>"}]}, "do not count from 0"),
        ({"special_tokens": [{"rank": 0, "token_str": "a"}]}, "an ordinary token too"),
    ],
)
def test_damaged_files(tmp_path: Path, tokens: list[bytes], changes: dict[str, Any], reason: str) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(tokens, **changes)))
    with pytest.raises(ValueError, match=reason):
        Tokenizer.from_directory(tmp_path)


def test_missing_bytes_and_listed_specials(tmp_path: Path, tokens: list[bytes]) -> None:
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(tekken([b"zzzz", *tokens[1:]])))
    with pytest.raises(ValueError, match="1 single bytes are missing"):
        Tokenizer.from_directory(tmp_path)
    listed = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(("<s>", "</s>", "[HI]"))]
    path.write_text(json.dumps(tekken(tokens, special_tokens=listed, config={"version": "v13"})))
    ours = Tokenizer.from_directory(tmp_path)
    assert (ours.bos_id, ours.eos_ids) == (0, (1,))
    assert ours.encode("[HI]<SPECIAL_3>", parse_special=True) == [0, 2, 3]
