"""tokenizer.model: a SentencePiece BPE model, written field by field.

Source: sentencepiece_model.proto for the field numbers. Written by hand, so that no protobuf runtime is needed for the
dozen fields that matter at inference.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_MODEL_TYPE_BPE = 2


def sentencepiece_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    named_ids: dict[str, int | None],
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
) -> bytes:
    """The bytes of tokenizer.model. Pieces stand in order of id; `named_ids` holds "unk", "bos", "eos", "pad" (or
    None).

    Text is not normalised, as in every model that GGUF calls "llama". Byte fallback is on if there are byte pieces.
    """
    body = b"".join(
        _message(1, _text(1, piece) + _float(2, score) + _varint(3, kind))
        for piece, score, kind in zip(pieces, scores, types, strict=True)
    )
    trainer = _varint(3, _MODEL_TYPE_BPE) + _varint(4, len(pieces)) + _varint(35, int(BYTE in types))
    for number, name in enumerate(("unk", "bos", "eos", "pad")):
        token_id = named_ids.get(name)
        trainer += _varint(40 + number, -1 if token_id is None else token_id)
        if token_id is not None:
            trainer += _text(45 + number, pieces[token_id])
    normalizer = (
        _text(1, "identity")
        + _varint(3, int(add_dummy_prefix))
        + _varint(4, int(remove_extra_whitespaces))
        + _varint(5, 1)
    )
    return body + _message(2, trainer) + _message(3, normalizer)


def _number(value: int) -> bytes:
    """Base-128 varint; a negative number is its 64-bit two's complement."""
    value &= (1 << 64) - 1
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(value)


def _float(field: int, value: float) -> bytes:
    return _number(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(content)) + content


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode("utf-8"))
