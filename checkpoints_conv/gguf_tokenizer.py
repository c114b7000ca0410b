"""GGUF tokenizer: the tokenizer inside a GGUF file, written as the files that a checkpoint directory carries.

Source: GGUF's specification of the keys `tokenizer.ggml.*`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import sentencepiece
import tokenizers

from checkpoints_conv.byte_level_bpe import PRE_TOKENIZERS
from checkpoints_conv.gguf_header import GGUFHeader
from checkpoints_conv.sentencepiece_model import NORMAL, UNKNOWN, USER_DEFINED, sentencepiece_model
from megatron_lowbit.files import replacing
from megatron_lowbit.tokenizer_byte_level import tokenizer_json

_NAMED = {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}


def write_tokenizer(gguf_path: Path, directory: Path) -> list[str]:
    """Write the tokenizer of `gguf_path` into `directory`; return the names of the files written.

    Byte-level BPE (`tokenizer.ggml.model` "gpt2") becomes `tokenizer.json`, SentencePiece BPE ("llama") becomes
    `tokenizer.model`; `tokenizer_config.json` holds the named tokens, whether a BOS is added, and the chat template.
    Each file is complete when it appears, and was loaded once before.

    FileNotFoundError for a missing GGUF. ValueError for one that cannot be read, holds no tokenizer or another kind of
    tokenizer, or whose tokenizer contradicts itself.
    """
    metadata = _read_metadata(gguf_path)
    tokens, types = _vocabulary(metadata, gguf_path)
    named = _named_ids(metadata, len(tokens), gguf_path)
    model = metadata.get("tokenizer.ggml.model")
    with _Refused(gguf_path):
        if model == "gpt2":
            name, adds_bos, data = "tokenizer.json", *_byte_level_bpe(metadata, tokens, types, named, gguf_path)
        elif model == "llama":
            name, adds_bos, data = "tokenizer.model", *_sentencepiece(metadata, tokens, types, named, gguf_path)
        else:
            raise ValueError(
                f"{gguf_path}: tokenizer.ggml.model is {model!r}; supported are 'gpt2' (byte-level BPE) and 'llama' "
                "(SentencePiece BPE). Copy the tokenizer files of the original checkpoint instead."
            )
    config = {
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": False,
        **{f"{key}_token": tokens[token_id] for key, token_id in named.items() if token_id is not None},
        "tokenizer_class": "PreTrainedTokenizerFast" if model == "gpt2" else "LlamaTokenizer",
    }
    if model == "llama":
        config["legacy"] = True  # llama.cpp puts the space prefix after every special token
    if metadata.get("tokenizer.chat_template"):
        config["chat_template"] = metadata["tokenizer.chat_template"]
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / name, data)
    settings = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    _replace(directory / "tokenizer_config.json", settings.encode("utf-8"))
    return [name, "tokenizer_config.json"]


def _read_metadata(path: Path) -> dict[str, Any]:
    """The keys `tokenizer.*` of a GGUF file, arrays included."""
    header = GGUFHeader.read(path)
    keys = [key for key in (*header.metadata, *header.arrays) if key.startswith("tokenizer.")]
    return {key: header.read_array(path, key) if key in header.arrays else header.metadata[key] for key in keys}


def _vocabulary(metadata: dict[str, Any], path: Path) -> tuple[list[str], list[int]]:
    """Tokens in order of id, and their types."""
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens") or []
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not tokens or len(types) != len(tokens):
        raise ValueError(
            f"{path} holds no complete tokenizer: it lists {len(tokens)} tokens and {len(types)} token types. Copy the "
            "tokenizer files of the original checkpoint instead."
        )
    seen: set[str] = set()
    for token_id, token in enumerate(tokens):
        if token in seen:
            raise ValueError(
                f"{path} lists token {token!r} again as id {token_id}: text has no unique ids. Copy the tokenizer "
                "files of the original checkpoint instead."
            )
        seen.add(token)
    return tokens, types


def _named_ids(metadata: dict[str, Any], count: int, path: Path) -> dict[str, int | None]:
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _NAMED.items()}
    for name, token_id in ids.items():
        if token_id is not None and not 0 <= token_id < count:
            raise ValueError(f"{path} names token id {token_id} as {name}, but has ids from 0 to {count - 1} only.")
    return ids


def _byte_level_bpe(
    metadata: dict[str, Any], tokens: list[str], types: list[int], named: dict[str, int | None], path: Path
) -> tuple[bool, bytes]:
    """Whether a BOS is added, and the bytes of tokenizer.json."""
    name = metadata.get("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"{path}: tokenizer.ggml.pre is {name!r}; supported are {', '.join(map(repr, sorted(PRE_TOKENIZERS)))}. "
            "How text is cut into words cannot be guessed: copy tokenizer.json of the original checkpoint instead."
        )
    pre = PRE_TOKENIZERS[name]
    merges = [merge.split(" ") for merge in metadata.get("tokenizer.ggml.merges") or []]
    known = set(tokens)
    for merge in merges:
        if len(merge) != 2:
            raise ValueError(f"{path}: merge {' '.join(merge)!r} is not two tokens with one space between them.")
        if "".join(merge) not in known:
            raise ValueError(f"{path}: merge {' '.join(merge)!r} makes {''.join(merge)!r}, which is no token.")
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", pre.adds_bos)) and named["bos"] is not None
    text = tokenizer_json(pre, tokens, types, merges, named["bos"] if adds_bos else None)
    tokenizers.Tokenizer.from_str(text)
    return adds_bos, text.encode("utf-8")


def _sentencepiece(
    metadata: dict[str, Any], tokens: list[str], types: list[int], named: dict[str, int | None], path: Path
) -> tuple[bool, bytes]:
    """Whether a BOS is added, and the bytes of tokenizer.model."""
    scores: list[float] = metadata.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise ValueError(f"{path} lists {len(scores)} scores for {len(tokens)} SentencePiece tokens.")
    # Converters write the spaces of user-defined tokens plainly, SentencePiece keeps its own sign for them.
    pieces = [
        token.replace(" ", "\u2581") if kind == USER_DEFINED else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    unknown = types.index(UNKNOWN) if UNKNOWN in types else named["unk"]
    # Gemma's files list <unk> among the control tokens
    types = [UNKNOWN if token_id == unknown else kind for token_id, kind in enumerate(types)]
    data = sentencepiece_model(
        pieces,
        scores,
        types,
        {"unk": unknown, "bos": named["bos"], "eos": named["eos"], "pad": named["pad"]},
        bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)),
    )
    sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(data)
    return bool(metadata.get("tokenizer.ggml.add_bos_token", True)) and named["bos"] is not None, data


class _Refused:
    """Turns the bare Exception (or panic) of `tokenizers` and the RuntimeError of `sentencepiece` into a ValueError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is Exception or kind is RuntimeError or (kind is not None and kind.__name__ == "PanicException"):
            raise ValueError(
                f"{self._path}: the tokenizer contradicts itself: {error}. Copy the tokenizer files of the original "
                "checkpoint instead."
            ) from error


def _replace(path: Path, data: bytes) -> None:
    with replacing(path) as beside:
        beside.write_bytes(data)
