"""Workspace: the packet buffers of the collectives, made once for a message shape and shared by all sync points."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar, cast

#: Shapes kept beyond the last one used: decoding and prefill take turns, so that neither should allocate each time.
KEPT_NBYTES = 256 << 20


class HasBuffers(Protocol):
    """What a workspace keeps: knows how much memory it holds."""

    @property
    def nbytes(self) -> int: ...


Buffers = TypeVar("Buffers", bound=HasBuffers)


class Workspace:
    """The buffers of recent message shapes, least recently used ones dropped beyond KEPT_NBYTES.

    One collective uses them at a time: sync points of a model follow each other.
    """

    def __init__(self, kept_nbytes: int = KEPT_NBYTES) -> None:
        self._kept_nbytes = kept_nbytes
        self._buffers: collections.OrderedDict[Hashable, HasBuffers] = collections.OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Buffers]) -> Buffers:
        """The buffers for `key`, made by `make` where there are none."""
        found = self._buffers.get(key)
        if found is None:
            found = self._buffers[key] = make()
            while len(self._buffers) > 1 and sum(one.nbytes for one in self._buffers.values()) > self._kept_nbytes:
                self._buffers.popitem(last=False)
        else:
            self._buffers.move_to_end(key)
        return cast(Buffers, found)
