"""tokenizer.json of a byte-level BPE, from its vocabulary, its merges and the name of its pre-tokenizer.

Sources: the names of pre-tokenizers are llama.cpp's; each stands for the pipeline that the model it is named after
publishes in its own tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONTROL, USER_DEFINED = 3, 4

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class PreTokenizer:
    """How text becomes the words inside which merges happen. `adds_bos` is the default where a GGUF does not say."""

    steps: tuple[dict[str, Any], ...]
    normalizer: dict[str, Any] | None = None
    ignore_merges: bool = False
    adds_bos: bool = False


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_GPT2 = PreTokenizer((_byte_level(True),))
PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "llama-bpe": PreTokenizer((_split(_LLAMA3_WORDS), _byte_level(False)), ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer((_split(_QWEN2_WORDS), _byte_level(False)), normalizer={"type": "NFC"}),
    "smollm": PreTokenizer(({"type": "Digits", "individual_digits": True}, _byte_level(True))),
}


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
        "decoder": _byte_level(True),
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
