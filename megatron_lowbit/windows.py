"""Windows of tokens for calibration and evaluation: evenly spaced, disjoint, BOS first where there is one."""

from __future__ import annotations

from typing import Protocol


class Encoder(Protocol):
    """The part of a tokenizer that windows need."""

    @property
    def adds_bos(self) -> bool: ...

    @property
    def bos_id(self) -> int | None: ...

    def encode(self, text: str, add_bos: bool = True) -> list[int]: ...


def text_windows(tokenizer: Encoder, text: str, count: int, length: int, at_least: int, what: str) -> list[list[int]]:
    """Up to `count` windows of exactly `length` tokens.

    Raises ValueError where the text gives fewer than `at_least`; `what` names the text in it.
    """
    if count < 1 or length < 2:
        raise ValueError(f"{what}: {count} windows of {length} tokens; at least 1 window of 2 tokens is needed")
    prefix = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    tokens = tokenizer.encode(text, add_bos=False)
    body = length - len(prefix)
    available = len(tokens) // body
    if available < at_least:
        raise ValueError(
            f"{what} is too short: its {len(tokens)} tokens give {available} windows of {length}, at least {at_least} "
            "are needed; use a longer text or shorter windows (--length)"
        )
    used = min(count, available)
    starts = [index * available // used * body for index in range(used)]
    return [prefix + tokens[start : start + body] for start in starts]
