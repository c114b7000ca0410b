"""How the ranks of a group find each other for their TCP connections: addresses, a token, one connection a pair."""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from megatron_lowbit.transport.tcp_mesh import TcpMesh

CONNECT_TIMEOUT_S = 15.0
_HELLO = struct.Struct("<16sI")  # token of the group, rank of who connects


def connect_mesh(
    rank: int,
    size: int,
    address: str,
    timeout_s: float,
    gather: Callable[[Any], list[Any]],
) -> tuple[TcpMesh | None, str]:
    """The mesh of all ranks, or None with the reason, the same on every rank. Called by all of them.

    address: of this host, as the others reach it. gather: every rank's JSON value in rank order, over another way.
    A random token, made by rank 0, keeps strangers and other runs out; like the process group's own connections, these
    are for a trusted network and are not encrypted.
    """
    token = secrets.token_bytes(16)
    sockets: dict[int, socket.socket] = {}
    problem = ""
    server: socket.socket | None = None
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.create_server((address, 0), family=family, backlog=size)
    except OSError as error:
        problem = f"rank {rank} cannot listen on {address} ({error.strerror or error})"
    try:
        port = 0 if server is None else server.getsockname()[1]
        doors = gather([address, port, token.hex() if rank == 0 else "", problem])
        problem = next((door[3] for door in doors if door[3]), "")
        if not problem and server is not None:
            try:
                _meet(rank, size, doors, bytes.fromhex(doors[0][2]), server, sockets)
            except OSError as error:
                problem = f"rank {rank} at {address}: {error.strerror or error}"
            problem = next((text for text in gather(problem) if text), "")
    finally:
        if server is not None:
            server.close()
    if problem:
        for connection in sockets.values():
            connection.close()
        return None, problem
    return TcpMesh(sockets, timeout_s), ""


def _meet(
    rank: int, size: int, doors: list[Any], token: bytes, server: socket.socket, sockets: dict[int, socket.socket]
) -> None:
    """Connects to all lower ranks and lets all higher ones in. OSError where one cannot be reached."""
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    for peer in range(rank):
        connection = socket.create_connection((doors[peer][0], doors[peer][1]), timeout=CONNECT_TIMEOUT_S)
        sockets[peer] = connection
        connection.sendall(_HELLO.pack(token, rank))
    while len(sockets) < size - 1:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        connection, _ = server.accept()
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
        given, peer = _HELLO.unpack(hello) if len(hello) == _HELLO.size else (b"", -1)
        if hmac.compare_digest(given, token) and rank < peer < size and peer not in sockets:
            sockets[peer] = connection
        else:  # somebody else's
            connection.close()


def own_address(environment: dict[str, str]) -> str:
    """The address under which other ranks reach this host.

    That of the interface named by GLOO_SOCKET_IFNAME, as for the process group; else the one from which this host
    reaches MASTER_ADDR. Raises OSError where there is none.
    """
    interface = environment.get("GLOO_SOCKET_IFNAME", "").split(",")[0].strip()
    if interface:
        return _interface_address(interface)
    master = environment.get("MASTER_ADDR", "127.0.0.1")
    family, kind, protocol, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing: it only looks up the route
        return str(probe.getsockname()[0])


def _interface_address(interface: str) -> str:
    import fcntl  # Linux and other Unixes only, as is the variable's use here

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
    return socket.inet_ntoa(answer[20:24])
