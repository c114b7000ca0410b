"""Tekken: Mistral's `tekken.json` as the text of a tokenizer.json.

The file lists byte strings by rank and leaves merging to tiktoken: of all neighbours whose join is a token, join those
of the lowest rank. The same ids come from a byte-level BPE whose merges are all ways to cut each token in two, token
after token in order of rank. So the library that reads every other tokenizer.json reads this one too: no further
dependency, and special tokens, decoding and speed are the same. Source: the format of mistral-common's `tekken.json`.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lowbit.tokenizer_byte_level import (
    BYTE_CHARACTERS,
    CONTROL,
    PreTokenizer,
    byte_level,
    split,
    tokenizer_json,
)

BOS, EOS = "<s>", "</s>"
NORMAL = 1
# Files of these versions may leave out their special tokens: those were fixed then.
UNLISTED_VERSIONS = ("v1", "v2", "v3", "v7")
UNLISTED_SPECIALS = (
    "<unk>", BOS, EOS, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip


def tekken_as_json(text: str, path: Path) -> str:
    """The tokenizer.json that encodes as this `tekken.json`; `path` names the file in errors.

    Ids: the special tokens in their order, filled up with `<SPECIAL_n>` to the number that the file reserves, then the
    tokens by rank up to its vocabulary size. A BOS goes before every text. ValueError for anything else than such a
    file.
    """
    try:
        document = json.loads(text)
        settings = document["config"]
        pattern, size, reserved = (
            settings[key] for key in ("pattern", "default_vocab_size", "default_num_special_tokens")
        )
        specials = _special_tokens(document, reserved, path)
        ranked = {
            int(entry["rank"]): base64.b64decode(entry["token_bytes"], validate=True) for entry in document["vocab"]
        }
        if not isinstance(pattern, str) or not 0 <= reserved < size:
            raise ValueError(f"pattern {pattern!r}, {reserved} special tokens of {size}")
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ValueError(
            f"{path} is not a readable Tekken file: {type(error).__name__}: {error}. Copy it again from the original "
            "checkpoint."
        ) from error
    count = size - reserved
    missing = next((rank for rank in range(count) if rank not in ranked), None)
    tokens = [ranked.get(rank, b"") for rank in range(count)]
    lost = set(range(256)) - {token[0] for token in tokens if len(token) == 1}
    if missing is not None or lost or len(set(tokens)) < count:
        raise ValueError(
            f"{path} is not a whole Tekken file: of {count} tokens, "
            + (f"rank {missing} is missing" if missing is not None else f"{len(lost)} single bytes are missing")
            + f", and {count - len(set(tokens))} are there twice. Copy it again from the original checkpoint."
        )
    names = [*specials, *("".join(BYTE_CHARACTERS[byte] for byte in token) for token in tokens)]
    if len(set(names)) < len(names):
        raise ValueError(
            f"{path}: a special token is an ordinary token too. Copy it again from the original checkpoint."
        )
    pre = PreTokenizer((split(pattern), byte_level(False)), ignore_merges=True)
    kinds = [CONTROL] * reserved + [NORMAL] * count
    merges = [[names[reserved + left], names[reserved + right]] for left, right in merges_of(tokens)]
    return tokenizer_json(pre, names, kinds, merges, specials.index(BOS) if BOS in specials else None)


def merges_of(tokens: Sequence[bytes]) -> list[tuple[int, int]]:
    """Pairs of ranks in the order in which they are to be merged, for tokens in order of rank."""
    ranks: Mapping[bytes, int] = {token: rank for rank, token in enumerate(tokens)}
    return [
        (ranks[token[:cut]], ranks[token[cut:]])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]


def _special_tokens(document: dict[str, Any], reserved: int, path: Path) -> list[str]:
    """Names of the special tokens in order of id, `reserved` of them."""
    listed = document.get("special_tokens")
    if listed is None:
        version = document["config"].get("version")
        if version not in UNLISTED_VERSIONS:
            raise ValueError(
                f"version {version!r} without special_tokens, which only {UNLISTED_VERSIONS} may leave out"
            )
        names = list(UNLISTED_SPECIALS)
    else:
        ordered = sorted(listed, key=lambda entry: entry["rank"])
        names = [str(entry["token_str"]) for entry in ordered]
        if [entry["rank"] for entry in ordered] != list(range(len(ordered))):
            raise ValueError("the ranks of the special tokens do not count from 0")
    if len(names) > reserved:
        raise ValueError(f"{len(names)} special tokens where {reserved} ids are reserved")
    return names + [f"<SPECIAL_{number}>" for number in range(len(names), reserved)]
