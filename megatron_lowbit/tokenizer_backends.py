"""Tokenizer backends: the two kinds of files a checkpoint's tokenizer may come in, behind one protocol."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import sentencepiece
import tokenizers

_USER_DEFINED, _CONTROL_TYPE = b"\x18\x04", 3  # `type: USER_DEFINED`, the last field of a serialised piece
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Backend(Protocol):
    """What the two kinds of files have in common. Ids given to `decode` are inside the vocabulary."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool

    def token_id(self, token: str) -> int | None: ...

    def encode(self, text: str, parse_special: bool) -> list[int]: ...

    def decode(self, ids: list[int], skip_special: bool) -> str: ...


def read_text(path: Path) -> str:
    """The UTF-8 text of a file; ValueError if it holds something else."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}. Copy it again from the original checkpoint.") from error


def content(token: Any) -> str | None:
    """Name of a token that a settings file gives as a string, as an object with "content", or as null."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def either(value: Any, default: Any) -> Any:
    """`value`, or `default` where a settings file says null or nothing."""
    return default if value is None else value


class JsonBackend:
    """The text of a `tokenizer.json` through `tokenizers`; `path` names it in errors."""

    def __init__(self, text: str, path: Path, config: dict[str, Any]) -> None:
        self._text = text
        self._parsing = self._load(path, config)
        self._literal = self._load(path, config)
        self._literal.encode_special_tokens = True
        self._byte_fallback = "ByteFallback" in str(self._parsing.decoder)
        self._specials = {i for i, token in self._parsing.get_added_tokens_decoder().items() if token.special}
        self.vocab_size = max(self._parsing.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        first = self._parsing.encode("", add_special_tokens=True).ids[:1]
        eos_name = content(config.get("eos_token"))
        if first and eos_name is not None and first[0] == self.token_id(eos_name) and config.get("bos_token") is None:
            first = []  # a post-processor that appends EOS and prepends nothing
        self.bos_id: int | None = first[0] if first else None
        self.eos_id: int | None = None
        bos_name = content(config.get("bos_token"))
        self.adds_bos = bool(first) and (bos_name is None or first[0] == self.token_id(bos_name))

    def _load(self, path: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
        with _PlainExceptionAsValueError(path):
            tokenizer = tokenizers.Tokenizer.from_str(self._text)
        # Files exported from training carry the training's lengths, which would cut or pad every prompt.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            name = content(config.get(key))
            if name is not None and name not in known and tokenizer.token_to_id(name) is not None:
                tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
        return tokenizer

    def token_id(self, token: str) -> int | None:
        return self._parsing.token_to_id(token)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        return (self._parsing if parse_special else self._literal).encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        text = self._parsing.decode(ids, skip_special_tokens=skip_special)
        if self._byte_fallback and "\ufffd" in text:
            # The decoder gives up a whole run of bytes for one bad byte; here only the bad ones are lost.
            kept = [i for i in ids if not (skip_special and i in self._specials)]
            names = [name for name in map(self._parsing.id_to_token, kept) if name is not None]
            text = self._parsing.decoder.decode(_isolate_bad_bytes(names))
        return text


class SentencePieceBackend:
    """`tokenizer.model` through `sentencepiece`, plus the added tokens of the JSON files beside it."""

    def __init__(self, path: Path, config: dict[str, Any], added_tokens: dict[str, Any]) -> None:
        model = path.read_bytes()
        self._model = _sentencepiece_model(model, path)
        tokens = _added_tokens(config, added_tokens)
        model = _as_controls(model, {token_id for token_id, token in tokens.items() if token.get("special")})
        self._model = _sentencepiece_model(model, path)
        # Protobuf messages merge when concatenated: normalizer_spec { add_dummy_prefix: false }.
        self._unprefixed = _sentencepiece_model(model + b"\x1a\x02\x18\x00", path)
        self._prefixes = self._model.encode("a") != self._unprefixed.encode("a")
        # Meta's and llama.cpp's way, a space before the text that follows any special token, unless `legacy` says
        # otherwise.
        self._prefix_each = bool(either(config.get("legacy"), True))
        count = self._model.vocab_size()
        names = {i: self._model.id_to_piece(i) for i in range(count)}
        self._bytes: dict[int, bytes] = {i: _piece_bytes(self._model, i, name) for i, name in names.items()}
        specials = {i for i in names if self._model.is_control(i) or self._model.is_unknown(i)}
        self._ids = {name: i for i, name in names.items()}
        literal: dict[int, str] = {}
        strip: dict[str, tuple[bool, bool]] = {}
        for token_id, token in tokens.items():
            name = str(token["content"])
            self._ids[name], self._bytes[token_id] = token_id, name.encode("utf-8")
            strip[name] = (bool(token.get("lstrip")), bool(token.get("rstrip")))
            if token.get("special"):
                specials.add(token_id)
            elif token_id >= count or not self._model.is_byte(token_id):
                literal[token_id] = name
        self._specials = specials
        always = {name: strip.get(name, (False, False)) for name in literal.values()}
        named = {name: strip.get(name, (False, False)) for name, i in self._ids.items() if i in specials}
        self._literal_pattern = _splitter(always)
        self._parsing_pattern = _splitter({**always, **named})
        self.vocab_size = max(self._bytes, default=-1) + 1
        self.bos_id: int | None = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.eos_id: int | None = self._model.eos_id() if self._model.eos_id() >= 0 else None
        self.adds_bos = self.bos_id is not None

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        pattern = self._parsing_pattern if parse_special else self._literal_pattern
        if pattern is None:
            return list(self._model.encode(text))
        ids: list[int] = []
        for number, part in enumerate(pattern.split(text)):
            if number % 2:  # re.split puts what the group matched, the special tokens, at the odd places
                ids.append(self._ids[part] if part in self._ids else self._ids[part.strip()])
            elif part:
                ids += (self._model if self._prefix_each or number == 0 else self._unprefixed).encode(part)
        return ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        kept = (i for i in ids if not (skip_special and i in self._specials))
        text = b"".join(self._bytes.get(i, b"") for i in kept).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._prefixes else text


class _PlainExceptionAsValueError:
    """`tokenizers` answers a bad file with the bare class Exception, or with a panic. Only these become ValueError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is Exception or (kind is not None and kind.__name__ == "PanicException"):
            raise ValueError(
                f"{self._path} is not a readable tokenizer.json: {error}. Copy it again from the original checkpoint."
            ) from error


def _sentencepiece_model(model: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a readable SentencePiece model ({len(model)} bytes): {error}. Copy it again from the "
            "original checkpoint (a file of about 130 bytes is a Git LFS pointer, not the model)."
        ) from error
    return processor


def _as_controls(model: bytes, token_ids: set[int]) -> bytes:
    """`model`, a sound SentencePiece model, with these user-defined pieces as control pieces.

    SentencePiece finds user-defined pieces in any text. Gemma's file lists `<start_of_turn>` among them, and what a
    user types must not become one. Source: sentencepiece_model.proto; its field 1 are the pieces, their field 3 the
    type.
    """
    changed = bytearray(model)
    position, token_id = 0, 0
    while token_ids and position < len(model):
        tag, position = _varint(model, position)
        if tag & 7 != 2:  # pieces and settings are messages; whatever else there is comes behind the pieces
            break
        nbytes, position = _varint(model, position)
        if tag >> 3 == 1:
            if token_id in token_ids and model.endswith(_USER_DEFINED, position, position + nbytes):
                changed[position + nbytes - 1] = _CONTROL_TYPE
            token_id += 1
        position += nbytes
    return bytes(changed)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A protobuf number and the position behind it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _piece_bytes(model: sentencepiece.SentencePieceProcessor, token_id: int, piece: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(piece) if model.is_byte(token_id) else None
    return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode("utf-8")


def _isolate_bad_bytes(names: list[str]) -> list[str]:
    """`names` with U+FFFD for each broken character among the byte tokens (`<0xE2>`)."""
    result: list[str] = []
    run = bytearray()
    for name in [*names, ""]:
        byte = _BYTE_TOKEN.fullmatch(name)
        if byte:
            run.append(int(byte[1], 16))
            continue
        for character in run.decode("utf-8", errors="replace"):
            result += [character] if character == "\ufffd" else [f"<0x{b:02X}>" for b in character.encode("utf-8")]
        run.clear()
        result.append(name)
    return result[:-1]


def _added_tokens(config: dict[str, Any], added_tokens: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Id -> description, of `added_tokens.json` (name: id), then of `added_tokens_decoder` (id: description)."""
    result: dict[int, dict[str, Any]] = {
        token_id: {"content": name, "special": True}
        for name, token_id in added_tokens.items()
        if isinstance(token_id, int)
    }
    for key, token in (config.get("added_tokens_decoder") or {}).items():
        if key.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str):
            result[int(key)] = token
    return result


def _splitter(names: dict[str, tuple[bool, bool]]) -> re.Pattern[str] | None:
    """Pattern for `re.split` that cuts out the names, longest first, with the spaces that belong to them."""
    parts = [
        (r"\s*" if left else "") + re.escape(name) + (r"\s*" if right else "")
        for name, (left, right) in sorted(names.items(), key=lambda item: -len(item[0]))
        if name
    ]
    return re.compile("(" + "|".join(parts) + ")") if parts else None
