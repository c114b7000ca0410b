"""Cases of the collectives, run on every rank of a RankGroup."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from helpers.messages import digest, draw_message, draw_wide_message

from megatron_lowbit.comm.all_reduce import build_all_reduce
from megatron_lowbit.parallel import ParallelContext

#: Whatever else could carry bytes: the tests count what `sendmsg` took, so these must not be used unseen.
_OTHER_WAYS = (
    "isend", "send", "recv", "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "gather",
    "scatter", "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "all_gather_object",
    "broadcast_object_list", "barrier",
)  # fmt: skip


@contextlib.contextmanager
def counted_sends() -> Iterator[dict[str, int]]:
    """Counts the bytes that the operating system took, below everything of ours but the headers of messages."""
    count = {"nbytes": 0}
    take = socket.socket.sendmsg

    def counting(self: socket.socket, *arguments: Any) -> int:
        taken = take(self, *arguments)
        count["nbytes"] += taken
        return taken

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("bytes went a way that these tests do not count")

    patched = [(dist, name, refuse) for name in _OTHER_WAYS]
    patched += [(socket.socket, name, refuse) for name in ("send", "sendall", "sendto")]
    patched += [(socket.socket, "sendmsg", counting)]
    originals = [(holder, name, getattr(holder, name)) for holder, name, _ in patched]
    for holder, name, replacement in patched:
        setattr(holder, name, replacement)
    try:
        yield count
    finally:
        for holder, name, original in originals:
            setattr(holder, name, original)


def messages(
    context: ParallelContext,
    seeds: list[int],
    backends: list[str],
    wide: bool = False,
    schemes: list[str] | None = None,
) -> dict[str, Any]:
    """Result digest, places that are not finite, and traffic of each message; backends may differ between ranks.

    schemes: taken in turn in place of those that messages usually have.
    """
    rows = []
    for seed in seeds:
        name = None if schemes is None else schemes[seed % len(schemes)]
        message = draw_wide_message(seed, context.size) if wide else draw_message(seed, context.size, name)
        backend = backends[(seed + context.rank) % len(backends)]
        hidden = message.partials[0].shape[1]
        all_reduce = build_all_reduce(context, message.scheme, hidden, message.constants, backend)
        mine = message.partials[context.rank]
        untouched = mine.clone()
        context.traffic.reset()
        with counted_sends() as count:
            full_TH = all_reduce(mine.unsqueeze(0))
        rows.append(
            {
                "digest": digest(full_TH),
                "shape": list(full_TH.shape),
                "dtype": str(full_TH.dtype),
                "not_finite": (~full_TH.isfinite()).flatten().nonzero().flatten().tolist(),
                "partial_kept": digest(mine) == digest(untouched),
                "traffic": dict(context.traffic.sent_nbytes),
                "messages": dict(context.traffic.messages),
                "counted": dict(count),
            }
        )
    return {"rows": rows}
