"""TcpMesh in one process: order, sizes, both directions at once, leaving peers; and how ranks find each other."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_lowbit.transport import rendezvous
from megatron_lowbit.transport.base import CommunicationError
from megatron_lowbit.transport.rendezvous import connect_mesh, own_address
from megatron_lowbit.transport.tcp_mesh import KEPT_VIEWS, TcpMesh

TIMEOUT_S = 5.0


def pair(timeout_s: float = TIMEOUT_S) -> tuple[TcpMesh, TcpMesh]:
    """The meshes of ranks 0 and 1."""
    left, right = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        left.close(), right.close()
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    return TcpMesh({1: left}, timeout_s), TcpMesh({0: right}, timeout_s)


@pytest.fixture
def meshes():
    both = pair()
    yield both
    for mesh in both:
        mesh.close()


def test_messages_arrive_in_order_whatever_is_waited_for_first(meshes):
    first, second = meshes
    sent = [torch.full((n,), n, dtype=torch.uint8) for n in (1, 5, 200)]
    got = [torch.zeros(len(one), dtype=torch.uint8) for one in sent]
    tickets = [second.receive(0, one) for one in got]
    for one in sent:
        first.send(1, one)
    second.wait([tickets[2]])
    second.wait([tickets[0], tickets[1]])
    assert all(torch.equal(a, b) for a, b in zip(sent, got, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.uint8])
def test_any_type_and_shape(meshes, dtype):
    first, second = meshes
    sent = torch.arange(24).reshape(2, 3, 4).to(dtype)
    got = torch.zeros_like(sent)
    second.receive(0, got)
    first.send(1, sent)
    second.wait(None)
    assert torch.equal(sent, got)


def test_large_messages_both_ways_at_once_do_not_wait_for_each_other(meshes):
    """More than all socket buffers hold: if a side only sent before it read, both would hang."""
    size = 64 << 20
    sent = [torch.randint(256, (size,), dtype=torch.uint8) for _ in range(2)]
    got = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]

    def side(index: int) -> None:
        mesh, peer = meshes[index], 1 - index
        mesh.receive(peer, got[index])
        mesh.send(peer, sent[index])
        mesh.wait(None)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(side, index) for index in range(2)]:
            future.result(timeout=60)
    assert torch.equal(got[0], sent[1]) and torch.equal(got[1], sent[0])


def test_what_comes_before_it_is_asked_for_is_not_lost(meshes):
    first, second = meshes
    sent = torch.arange(1000)
    first.send(1, sent)
    first.wait(None)
    second.progress()
    got = torch.zeros_like(sent)
    second.wait([second.receive(0, got)])
    assert torch.equal(sent, got)


def test_a_sent_tensor_may_be_reused_after_waiting_for_everything(meshes):
    first, second = meshes
    buffer, got = torch.ones(1000), [torch.zeros(1000), torch.zeros(1000)]
    for index in range(2):
        first.send(1, buffer)
        first.wait(None)
        buffer.fill_(index + 2)
    second.wait([second.receive(0, one) for one in got])
    assert [one.unique().tolist() for one in got] == [[1.0], [2.0]]


def test_a_message_of_another_size_is_an_error_that_says_so(meshes):
    first, second = meshes
    first.send(1, torch.zeros(10, dtype=torch.uint8))
    second.receive(0, torch.zeros(12, dtype=torch.uint8))
    with pytest.raises(CommunicationError, match="message 1 of 10 bytes where message 1 of 12 was expected"):
        second.wait(None)


def test_a_peer_that_left_is_named(meshes):
    first, second = meshes
    first.close()
    second.receive(0, torch.zeros(4))
    with pytest.raises(CommunicationError, match="rank 0 \\("):
        second.wait(None)


def test_a_peer_may_leave_when_nothing_is_expected_of_it():
    """The last one out must not fail because another was faster."""
    first, second = pair()
    sent, got = torch.ones(3), torch.zeros(3)
    first.send(1, sent)
    first.wait(None)
    first.close()
    second.wait([second.receive(0, got)])
    second.progress()
    second.wait(None)
    assert torch.equal(sent, got)
    second.close()


def test_a_silent_peer_is_named_after_the_timeout():
    first, second = pair(timeout_s=0.2)
    second.receive(0, torch.zeros(4))
    began = time.monotonic()
    with pytest.raises(CommunicationError, match=r"rank 0 \(no answer for 0.2 s\)"):
        second.wait(None)
    assert time.monotonic() - began < 10
    first.close(), second.close()


def test_remembered_addresses_are_bounded_and_follow_the_tensor(meshes):
    first, second = meshes
    for value in range(KEPT_VIEWS + 10):
        sent, got = torch.full((3,), value), torch.zeros(3, dtype=torch.int64)
        first.send(1, sent)
        second.wait([second.receive(0, got)])
        assert got.tolist() == [value] * 3
    assert len(first._views) <= KEPT_VIEWS


# ---- finding each other ---------------------------------------------------------------------------------------------


class Gather:
    """`all_gather_json` for threads that play ranks."""

    def __init__(self, size: int) -> None:
        self.values: list[object] = [None] * size
        self._barrier = threading.Barrier(size)

    def of(self, rank: int):
        def gather(value):
            self.values[rank] = value
            self._barrier.wait(20)
            found = list(self.values)
            self._barrier.wait(20)
            return found

        return gather


def meet(addresses: list[str], timeout_s: float = TIMEOUT_S):
    gather = Gather(len(addresses))
    with ThreadPoolExecutor(len(addresses)) as pool:
        futures = [
            pool.submit(connect_mesh, rank, len(addresses), address, timeout_s, gather.of(rank))
            for rank, address in enumerate(addresses)
        ]
        return [future.result(timeout=60) for future in futures]


@pytest.mark.parametrize("size", [2, 3, 7])
def test_everybody_meets_everybody(size):
    meshes = [mesh for mesh, problem in meet(["127.0.0.1"] * size) if not problem]
    assert len(meshes) == size
    for rank, mesh in enumerate(meshes):
        for peer in range(size):
            if peer != rank:
                mesh.send(peer, torch.tensor([rank, peer]))
    for rank, mesh in enumerate(meshes):
        got = {peer: torch.zeros(2, dtype=torch.int64) for peer in range(size) if peer != rank}
        mesh.wait([mesh.receive(peer, one) for peer, one in got.items()])
        assert {peer: one.tolist() for peer, one in got.items()} == {peer: [peer, rank] for peer in got}
    for mesh in meshes:
        mesh.close()


def test_one_rank_that_cannot_listen_is_a_reason_for_all():
    # an address of the block for documentation: no host has it
    results = meet(["127.0.0.1", "192.0.2.1", "127.0.0.1"])
    assert [mesh for mesh, _ in results] == [None] * 3
    assert len({problem for _, problem in results}) == 1
    assert "rank 1 cannot listen on 192.0.2.1" in results[0][1]


def test_strangers_are_turned_away(monkeypatch):
    """A connection without the token of the group takes nobody's place."""
    create = socket.create_server

    def with_a_stranger(address, **options):
        server = create(address, **options)
        stranger = socket.create_connection(server.getsockname())
        stranger.sendall(rendezvous._HELLO.pack(b"\0" * 16, 1))
        return server

    monkeypatch.setattr(rendezvous.socket, "create_server", with_a_stranger)
    results = meet(["127.0.0.1"] * 2)
    assert all(mesh is not None for mesh, _ in results), results
    got = torch.zeros(3)
    results[1][0].send(0, torch.ones(3))
    results[0][0].wait([results[0][0].receive(1, got)])
    assert got.tolist() == [1.0] * 3


def test_own_address():
    assert own_address({}) == "127.0.0.1"
    assert own_address({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": ""}) == "127.0.0.1"
    assert own_address({"GLOO_SOCKET_IFNAME": "lo,eth0"}) == "127.0.0.1"
    with pytest.raises(OSError):
        own_address({"GLOO_SOCKET_IFNAME": "nosuch0"})
