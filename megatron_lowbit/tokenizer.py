"""Tokenizer: text to token ids and back, from the files that a checkpoint directory carries.

`tokenizer.json` is read by `tokenizers`, otherwise `tokenizer.model` by `sentencepiece`, otherwise `tekken.json` is
turned into the first. Nothing in the directory is executed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lowbit.tokenizer_backends import Backend, JsonBackend, SentencePieceBackend, content, either, read_text
from megatron_lowbit.tokenizer_tekken import BOS, EOS, tekken_as_json


class Tokenizer:
    """Encodes and decodes with the tokenizer of one checkpoint directory.

    `vocab_size` is the highest token id plus one (an embedding may be padded beyond it); `eos_ids` are all ids that
    end a reply: the tokenizer's own first, then those of `generation_config.json` (else `config.json`).
    """

    def __init__(
        self, backend: Backend, config: dict[str, Any], extra_eos: Sequence[int], chat_template: str | None
    ) -> None:
        self._backend = backend
        self.vocab_size: int = backend.vocab_size
        self.bos_id = _named_id(backend, config, "bos_token", backend.bos_id)
        ends = (
            _named_id(backend, config, "eos_token", backend.eos_id),
            *extra_eos,
            _named_id(backend, config, "eot_token", None),
        )
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(end for end in ends if end is not None))
        self.adds_bos: bool = self.bos_id is not None and bool(either(config.get("add_bos_token"), backend.adds_bos))
        self.chat_template = chat_template
        # The names that a chat template writes into a prompt.
        self.bos_token: str = "" if self.bos_id is None else self.decode([self.bos_id], skip_special=False)
        self.eos_token: str = self.decode(self.eos_ids[:1], skip_special=False)

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Open `tokenizer.json`, else `tokenizer.model`, else `tekken.json` in `path`, with the settings beside it.

        Raises FileNotFoundError if the directory or all three are missing, ValueError if a file cannot be read.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise FileNotFoundError(f"No tokenizer: {directory} is not a directory. Give a checkpoint directory.")
        config = {
            **_read_json_object(directory / "special_tokens_map.json"),
            **_read_json_object(directory / "tokenizer_config.json"),
        }
        backend: Backend
        if (directory / "tokenizer.json").is_file():
            backend = JsonBackend(read_text(directory / "tokenizer.json"), directory / "tokenizer.json", config)
        elif (directory / "tokenizer.model").is_file():
            added = _read_json_object(directory / "added_tokens.json")
            backend = SentencePieceBackend(directory / "tokenizer.model", config, added)
        elif (directory / "tekken.json").is_file():
            tekken = directory / "tekken.json"
            config = {"bos_token": BOS, "eos_token": EOS, **config}
            backend = JsonBackend(tekken_as_json(read_text(tekken), tekken), tekken, config)
        else:
            raise FileNotFoundError(
                f"No tokenizer in {directory}: neither tokenizer.json, tokenizer.model nor tekken.json is there. Copy "
                "one of them from the original checkpoint."
            )
        generation = _read_json_object(directory / "generation_config.json").get("eos_token_id")
        ends = either(generation, _read_json_object(directory / "config.json").get("eos_token_id"))
        ends = ends if isinstance(ends, list) else [ends]
        return cls(backend, config, [end for end in ends if isinstance(end, int)], _chat_template(directory, config))

    def encode(self, text: str, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`. A BOS goes first only if `add_bos` and the tokenizer itself adds one (`adds_bos`).

        With `parse_special`, names of special tokens in the text (`<s>`, `<|im_end|>`) become those tokens: right
        for a rendered chat prompt, wrong for a user's text. ValueError for text that is not valid Unicode (lone
        surrogates).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"Cannot encode text: {error.object[error.start]!r} at position {error.start} is a lone surrogate, "
                "not a character. Read the text with errors='replace'."
            ) from error
        ids = self._backend.encode(text, parse_special)
        return [self.bos_id, *ids] if add_bos and self.adds_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that form no character show as U+FFFD and leave their neighbours whole.

        Ids from `vocab_size` on (padding rows of an embedding) have no text. ValueError for a negative id.
        """
        if any(token_id < 0 for token_id in ids):
            raise ValueError(f"Cannot decode: got token id {min(ids)}; ids go from 0 to {self.vocab_size - 1}.")
        return self._backend.decode([i for i in ids if i < self.vocab_size], skip_special)


def _named_id(backend: Backend, config: dict[str, Any], key: str, default: int | None) -> int | None:
    """Id of the token that `tokenizer_config.json` names under `key`; `default` where it names none."""
    name = content(config.get(key))
    if name is None:
        return default
    token_id = backend.token_id(name)
    if token_id is None:
        raise ValueError(
            f"tokenizer_config.json names {name!r} as its {key}, but the vocabulary of {backend.vocab_size} tokens "
            "has no such token. The two files belong to different models: copy both from one checkpoint."
        )
    return token_id


def _read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a settings file, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Copy it again from the original checkpoint.") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a JSON {type(value).__name__}, expected an object. Copy it again from the checkpoint."
        )
    return value


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """`chat_template.jinja`, else that of `tokenizer_config.json`: one template, or named ones with a default."""
    if (directory / "chat_template.jinja").is_file():
        return read_text(directory / "chat_template.jinja")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
