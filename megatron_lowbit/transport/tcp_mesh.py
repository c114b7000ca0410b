"""TcpMesh: one TCP connection between any two ranks, driven by the caller's own thread.

Small messages of a CPU group are bound by wake-ups and hand-overs between threads, not by bytes. Here `send` copies
into the socket's buffer and returns, `wait` reads straight into the caller's tensor: no thread, no queue, no copy of
ours. The kernel moves bytes while the caller computes, which is what pieces of a large message live from.
"""

from __future__ import annotations

import collections
import ctypes
import select
import socket
import struct
import time
from collections.abc import Sequence

import torch

from megatron_lowbit.transport.base import CommunicationError, ranks_text

#: number of the message on this connection, bytes that follow
HEADER = struct.Struct("<IQ")

LOW_WATER_NBYTES = 64 << 10
KEPT_VIEWS = 4096


class _Incoming:
    """One expected message: header and payload, filled from the front."""

    __slots__ = ("header", "nbytes", "payload", "tensor", "ticket")

    def __init__(self, tensor: torch.Tensor, payload: memoryview, ticket: int) -> None:
        self.tensor = tensor  # `payload` is its memory by address: it must live as long
        self.header = bytearray(HEADER.size)
        self.payload = payload
        self.nbytes = 0  # read so far, header included
        self.ticket = ticket


class _Connection:
    """One peer: what is still to go out and what is expected, in order."""

    def __init__(self, peer: int, connection: socket.socket) -> None:
        self.peer = peer
        self.socket = connection
        self.outbox: collections.deque[memoryview] = collections.deque()
        self.inbox: collections.deque[_Incoming] = collections.deque()
        self.sending: list[torch.Tensor] = []  # whose memory the outbox holds by address
        self.sent = self.received = 0  # messages
        self.events = 0  # what poll watches
        self._low_water = 1

    def push(self) -> None:
        """Sends what the socket takes now."""
        while self.outbox:
            try:
                count = self.socket.sendmsg(list(self.outbox)[:16])
            except BlockingIOError:
                return
            while count:
                first = self.outbox[0]
                if count < len(first):
                    self.outbox[0] = first[count:]
                    return
                count -= len(first)
                self.outbox.popleft()
        self.sending.clear()

    def await_whole_messages(self) -> None:
        """Has poll report the next message when all of it is there, up to LOW_WATER_NBYTES: fewer wake-ups.

        Its header first: a message that is shorter than expected must be noticed, not waited for.
        """
        message = self.inbox[0]
        wanted = HEADER.size - message.nbytes
        if wanted <= 0:
            wanted = min(HEADER.size + len(message.payload) - message.nbytes, LOW_WATER_NBYTES)
        if wanted != self._low_water:
            self._low_water = wanted
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)

    def pull(self, arrived: set[int]) -> None:
        """Reads what is there; adds the tickets of whole messages to `arrived`."""
        while self.inbox:
            message = self.inbox[0]
            done = message.nbytes - HEADER.size
            try:
                if done < 0:
                    buffers = [memoryview(message.header)[message.nbytes :], message.payload]
                    count = self.socket.recvmsg_into(buffers)[0]
                else:
                    count = self.socket.recv_into(message.payload[done:])
            except BlockingIOError:
                return
            if count == 0:
                raise ConnectionResetError("it closed the connection")
            message.nbytes += count
            if done < 0 <= message.nbytes - HEADER.size:
                self._check(message)
            if message.nbytes == HEADER.size + len(message.payload):
                self.inbox.popleft()
                arrived.add(message.ticket)

    def _check(self, message: _Incoming) -> None:
        number, nbytes = HEADER.unpack(message.header)
        self.received += 1
        if (number, nbytes) != (self.received, len(message.payload)):
            raise CommunicationError(
                f"rank {self.peer} (it sent message {number} of {nbytes} bytes where message {self.received} of "
                f"{len(message.payload)} was expected: do all ranks run the same program with the same arguments?)"
            )


class TcpMesh:
    """Transport of CPU tensors. One thread uses it at a time."""

    name = "TCP connections of its own"
    overlaps = True

    def __init__(self, sockets: dict[int, socket.socket], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._connections = {peer: _Connection(peer, connection) for peer, connection in sockets.items()}
        self._by_descriptor = {one.socket.fileno(): one for one in self._connections.values()}
        for connection in sockets.values():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
        self._poll = select.poll()
        self._arrived: set[int] = set()
        self._tickets = 0
        self._views: dict[tuple[int, int], memoryview] = {}

    def send(self, peer: int, tensor: torch.Tensor) -> None:
        to = self._connections[peer]
        payload = self._bytes_of(tensor)
        to.sent += 1
        to.outbox.append(memoryview(HEADER.pack(to.sent, len(payload))))
        to.outbox.append(payload)
        to.sending.append(tensor)
        if len(to.outbox) == 2:
            self._serve(to, reading=False)

    def receive(self, peer: int, tensor: torch.Tensor) -> int:
        self._tickets += 1
        self._connections[peer].inbox.append(_Incoming(tensor, self._bytes_of(tensor), self._tickets))
        return self._tickets

    def progress(self) -> None:
        self._step(0)

    def wait(self, tickets: Sequence[int] | None) -> None:
        deadline = 0.0
        while True:
            if tickets is None:
                if not any(one.inbox or one.outbox for one in self._connections.values()):
                    self._arrived.clear()
                    return
            elif self._arrived.issuperset(tickets):
                return
            if self._step(1000):
                deadline = 0.0
            elif not deadline:
                deadline = time.monotonic() + self._timeout_s
            elif time.monotonic() > deadline:
                silent = sorted(one.peer for one in self._connections.values() if one.inbox or one.outbox)
                raise CommunicationError(f"rank {ranks_text(silent)} (no answer for {self._timeout_s:g} s)")

    def close(self) -> None:
        for one in self._connections.values():
            one.socket.close()

    def _step(self, patience_ms: int) -> bool:
        """Waits up to so long for a socket to be ready and serves those that are; False where none was."""
        for descriptor, one in self._by_descriptor.items():
            if one.inbox:
                one.await_whole_messages()
            events = (select.POLLIN if one.inbox else 0) | (select.POLLOUT if one.outbox else 0)
            if events != one.events:
                # a peer that we want nothing of may leave: it is not watched
                if events:
                    self._poll.register(descriptor, events)
                else:
                    self._poll.unregister(descriptor)
                one.events = events
        ready = self._poll.poll(patience_ms)
        for descriptor, _ in ready:
            self._serve(self._by_descriptor[descriptor], reading=True)
        return bool(ready)

    def _serve(self, one: _Connection, reading: bool) -> None:
        try:
            if one.outbox:
                one.push()
            if reading:
                one.pull(self._arrived)
        except OSError as error:
            reason = error.strerror or str(error)
            raise CommunicationError(f"rank {one.peer} ({reason})") from error

    def _bytes_of(self, tensor: torch.Tensor) -> memoryview:
        """The memory of a tensor. Views are kept: collectives use the same buffers again and again."""
        assert tensor.is_contiguous() and tensor.is_cpu
        key = (tensor.data_ptr(), tensor.nbytes)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= KEPT_VIEWS:
                self._views.clear()
            # by address, so that it holds no memory; messages under way hold the tensor
            view = self._views[key] = memoryview((ctypes.c_ubyte * key[1]).from_address(key[0])).cast("B")
        return view
