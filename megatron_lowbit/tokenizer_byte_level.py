"""tokenizer.json of a byte-level BPE, from its vocabulary, its merges and the way it cuts text into words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONTROL, USER_DEFINED = 3, 4

# GPT-2's printable stand-in for each byte: itself where it is visible, otherwise the next one from U+0100 on
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_CHARACTERS: dict[int, str] = {
    **{byte: chr(byte) for byte in _VISIBLE},
    **{byte: chr(0x100 + number) for number, byte in enumerate(_HIDDEN)},
}


@dataclass(frozen=True)
class PreTokenizer:
    """How text becomes the words inside which merges happen.

    ignore_merges: a word that is a token becomes that token, whatever the merges make of it. adds_bos: the default
    where a file does not say.
    """

    steps: tuple[dict[str, Any], ...]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False
    adds_bos: bool = False


def byte_level(use_regex: bool) -> dict[str, Any]:
    """The step that turns bytes into `BYTE_CHARACTERS`; with `use_regex` it first cuts words as GPT-2 did."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def split(pattern: str) -> dict[str, Any]:
    """The step that makes each match of `pattern`, and what lies between two, a word of its own."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def tokenizer_json(
    pre: PreTokenizer, tokens: Sequence[str], types: Sequence[int], merges: Sequence[Sequence[str]], bos_id: int | None
) -> str:
    """The text of tokenizer.json. Tokens and types stand in order of id; a `bos_id` goes before every text."""
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind == CONTROL,
            }
            for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": pre.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(pre.steps)},
        "post_processor": None if bos_id is None else _prepend(bos_id, tokens[bos_id]),
        "decoder": byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [list(merge) for merge in merges],
        },
    }
    return json.dumps(document, ensure_ascii=False)


def _prepend(token_id: int, token: str) -> dict[str, Any]:
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
