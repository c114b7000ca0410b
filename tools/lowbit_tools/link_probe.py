"""What a link really carries: bytes through one TCP connection, timed by the sender until the receiver has them all.

`python -m lowbit_tools.link_probe serve ADDRESS` on one host, `… measure ADDRESS` on another.
"""

from __future__ import annotations

import argparse
import socket
import struct
import time
from collections.abc import Sequence

PORT = 29477
SIZES = (64 << 10, 1 << 20, 16 << 20)
ROUNDS = 5
_HEADER = struct.Struct("!Q")


def serve(address: str) -> None:
    """Answers one measuring peer and returns."""
    with socket.create_server((address, PORT)) as server:
        connection, _ = server.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            buffer = bytearray(1 << 20)
            while header := connection.recv(_HEADER.size, socket.MSG_WAITALL):
                left = _HEADER.unpack(header)[0]
                while left:
                    left -= connection.recv_into(buffer, min(left, len(buffer)))
                connection.sendall(b"!")


def measure(address: str, wait_s: float = 10.0) -> list[tuple[int, float]]:
    """(bytes, best seconds of ROUNDS) of each size, the round trip of the answer included."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            connection = socket.create_connection((address, PORT), timeout=wait_s)
            break
        except ConnectionRefusedError:  # the other side is still starting
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    rows = []
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for nbytes in SIZES:
            payload = bytes(nbytes)
            times = []
            for _ in range(ROUNDS):
                began = time.perf_counter()
                connection.sendall(_HEADER.pack(nbytes))
                connection.sendall(payload)
                connection.recv(1, socket.MSG_WAITALL)
                times.append(time.perf_counter() - began)
            rows.append((nbytes, min(times)))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the probe."""
    parser = argparse.ArgumentParser(description="Measure what a TCP link carries.")
    parser.add_argument("role", choices=("serve", "measure"))
    parser.add_argument("address")
    args = parser.parse_args(arguments)
    if args.role == "serve":
        serve(args.address)
        return
    for nbytes, seconds in measure(args.address):
        rate = 8 * nbytes / seconds / 1e6
        print(f"link probe: {nbytes >> 10:>6} KiB in {1e3 * seconds:9.3f} ms, {rate:9.1f} Mbit/s", flush=True)


if __name__ == "__main__":
    main()
