"""TextStream: token ids in, printable text out, as soon as it cannot change any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """The part of `Tokenizer` a stream needs. Invalid bytes decode to one U+FFFD per broken character."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


class TextStream:
    """Decodes a growing list of token ids piece by piece; the cost of a push does not grow with the length of the text.

    All returned pieces together are `tokenizer.decode(ids)`, cut before the stop string that is complete first (of
    two that end at the same place, the longer). A piece never holds half a character, nor the start of what may
    become a stop string.

    `stopped` is True once a stop string was seen; later pushes are ignored and return "".
    """

    def __init__(self, tokenizer: Decoder, stop_strings: Sequence[str] = ()) -> None:
        if isinstance(stop_strings, str):
            raise ValueError(
                f"stop_strings must be a list of strings, got the string {stop_strings!r}: write [{stop_strings!r}]."
            )
        if not all(stop_strings):
            raise ValueError(f"stop_strings must not hold an empty string, got {list(stop_strings)!r}: leave it out.")
        self._tokenizer = tokenizer
        self._stops = tuple(stop_strings)
        self._longest_stop = max(map(len, self._stops), default=0)
        self._window: list[int] = []  # the last ids: enough of them to decode the next one in its context
        self._settled = 0  # how many ids of the window ended with a whole character
        self._shown = 0  # how many characters of the window's text have gone to _held
        self._held = ""  # text that may be the start of a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add one id; return the text that has become certain ("" if none has)."""
        if self.stopped:
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        unfinished = text.endswith("\ufffd")  # perhaps a character whose other bytes come with the next ids
        certain = text[:-1] if unfinished else text
        new, self._shown = certain[self._shown :], len(certain)
        if not unfinished:
            self._shorten_window()
        return self._release(new)

    def finish(self) -> str:
        """Return what was held back; call it once, after the last push."""
        if self.stopped:
            return ""
        rest = self._tokenizer.decode(self._window)[self._shown :]
        self._window, self._settled, self._shown = [], 0, 0
        text = self._release(rest)
        held, self._held = self._held, ""
        return text + held

    def _shorten_window(self) -> None:
        """Keep only the ids since the last whole character, if they are context enough for the next id.

        Decoders drop a space at the very start of a text, so the window must begin with something that isn't one.
        """
        tail = self._window[self._settled :]
        tail_text = self._tokenizer.decode(tail)
        if tail_text.strip(" "):
            self._window, self._shown = tail, len(tail_text)
        self._settled = len(self._window)

    def _release(self, new: str) -> str:
        self._held += new
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)[1]], ""
            return text
        keep = self._possible_stop()
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        for length in range(min(self._longest_stop - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
