"""ParallelContext: which tensor-parallel ranks live in this process and how bytes reach the others. No globals."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from megatron_lowbit.transport.base import (
    CommunicationError,
    TrafficCounter,
    Transport,
    ranks_text,
)
from megatron_lowbit.transport.process_group import ProcessGroupTransport
from megatron_lowbit.transport.rendezvous import connect_mesh, own_address

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 600.0
TransportChoice = Literal["auto", "tcp", "process-group"]

Result = TypeVar("Result")


class RankError(RuntimeError):
    """Some rank failed; raised on all of them with the same text, which names the failing ranks."""


@dataclass(frozen=True)
class ParallelContext:
    """One tensor-parallel group as this process sees it.

    rank, size: tensor-parallel rank of this process and number of ranks. With `virtual=True` this one process plays
    all `size` ranks (`rank` is 0): row-parallel layers compute every rank's partial sum, everything else is unsharded.
    group: torch process group, None when no other process takes part.
    transport: what carries tensors to the other ranks: by default the process group itself.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    virtual: bool = False
    traffic: TrafficCounter = field(default_factory=TrafficCounter, compare=False)
    transport: Transport | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ValueError(f"tensor-parallel rank {self.rank} of {self.size}: the rank must lie in [0, size)")
        if self.size > 1 and not self.virtual and self.group is None:
            raise ValueError(f"{self.size} tensor-parallel ranks need a process group, or virtual=True in one process")
        if self.group is not None and self.transport is None:
            object.__setattr__(self, "transport", ProcessGroupTransport(self.group))

    @classmethod
    def single(cls, device: str | torch.device = "cpu") -> ParallelContext:
        return cls(device=torch.device(device))

    @classmethod
    def virtual_ranks(cls, size: int, device: str | torch.device = "cpu") -> ParallelContext:
        """All `size` ranks inside this process: same codecs, same sums in the same order, no network."""
        return cls(size=size, device=torch.device(device), virtual=size > 1)

    @classmethod
    def from_environment(
        cls,
        device: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        transport: TransportChoice = "auto",
    ) -> ParallelContext:
        """Joins the process group that `torchrun` described in the environment (a single rank without it).

        gloo on CPU, NCCL with one GPU a rank on CUDA. transport: on a CPU, tensors go over TCP connections of our own
        (several times faster than gloo's for small messages); "auto" falls back to the process group where ranks
        cannot reach each other that way, "tcp" raises then. Raises ValueError where device or transport do not fit.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        rank = int(os.environ.get("RANK", "0"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"local rank {local_rank} needs its own GPU, {torch.cuda.device_count()} found; "
                    "start fewer ranks a host or pass --device cpu"
                )
            where = torch.device("cuda", local_rank)
            torch.cuda.set_device(where)
        else:
            where = torch.device(kind)
        if size == 1:
            return cls(device=where)
        if not dist.is_initialized():
            backend = "nccl" if where.type == "cuda" else "gloo"
            try:
                dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
            except (dist.DistError, ValueError) as error:
                address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                raise ValueError(
                    f"rank {rank} of {size} could not join the process group at {address} "
                    f"({str(error).splitlines()[0]}); is the port free, and did all ranks start?"
                ) from error
        assert dist.group.WORLD is not None
        context = cls(rank=rank, size=size, device=where, group=dist.group.WORLD)
        if where.type != "cpu" or transport == "process-group":
            if transport == "tcp":
                raise ValueError(f"transport 'tcp' carries tensors on a CPU, these are on {where}; use 'process-group'")
            return context
        return context._with_mesh(timeout_s, required=transport == "tcp")

    def _with_mesh(self, timeout_s: float, required: bool) -> ParallelContext:
        try:
            address = own_address(dict(os.environ))
        except OSError as error:
            address = f"no address ({error})"  # which nobody can listen on: all ranks learn of it together
        mesh, problem = connect_mesh(self.rank, self.size, address, timeout_s, self.all_gather_json)
        if mesh is not None:
            return replace(self, transport=mesh, traffic=TrafficCounter())
        hint = "name the network interface of each host in GLOO_SOCKET_IFNAME"
        if required:
            raise RankError(f"transport 'tcp': {problem}; {hint}, or use 'process-group'")
        if self.is_first:
            logger.warning("messages go through gloo, which is slower: %s; %s", problem, hint)
        self.traffic.reset()
        return self

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group()

    # ---- what this process holds -------------------------------------------------------------------------------

    @property
    def local_ranks(self) -> range:
        """Tensor-parallel ranks whose partial sums this process computes."""
        return range(self.size) if self.virtual else range(self.rank, self.rank + 1)

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, size) for cutting weights: virtual ranks share the one full copy."""
        return (0, 1) if self.virtual else (self.rank, self.size)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def peers(self) -> list[int]:
        """All other ranks, ascending."""
        return [rank for rank in range(self.size) if rank != self.rank]

    # ---- moving bytes ------------------------------------------------------------------------------------------

    def exchange(
        self,
        outgoing: Mapping[int, torch.Tensor],
        incoming: Mapping[int, torch.Tensor],
        purpose: str,
        where: str = "",
    ) -> None:
        """Sends each tensor of `outgoing` to its rank while filling those of `incoming`; returns when all arrived.

        One message a peer and call; empty tensors are not sent, so both sides must agree on the sizes. Tensors are
        contiguous and on `device`; `incoming` buffers belong to the caller. Traffic is counted under `purpose`;
        `where` names the sync point in errors.
        """
        assert self.transport is not None
        tickets = [self.receive(peer, tensor) for peer, tensor in incoming.items()]
        for peer, tensor in outgoing.items():
            self.send(peer, tensor, purpose)
        if tickets or outgoing:
            self.wait(None, where or purpose, purpose)

    def send(self, peer: int, tensor: torch.Tensor, purpose: str) -> None:
        """Starts sending a tensor, which must stay as it is until `wait(None, …)` returns. Empty ones are not sent."""
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes:
            assert self.transport is not None
            self.transport.send(peer, tensor)
        self.traffic.add(purpose, nbytes, 1 if nbytes else 0)

    def receive(self, peer: int, tensor: torch.Tensor) -> int:
        """Says where the next message of `peer` goes; returns a ticket to wait for (0: empty, nothing will come)."""
        assert self.transport is not None
        return self.transport.receive(peer, tensor) if tensor.numel() else 0

    def progress(self) -> None:
        """Moves what can be moved without waiting."""
        if self.transport is not None:
            self.transport.progress()

    def wait(self, tickets: Sequence[int] | None, where: str, purpose: str) -> None:
        """Returns when the messages with these tickets have arrived; None: all have, and sent tensors may be reused.

        `where` names the sync point in errors. Raises CommunicationError where a peer ended or did not answer.
        """
        assert self.transport is not None
        try:
            self.transport.wait(None if tickets is None else [ticket for ticket in tickets if ticket])
        except CommunicationError as error:
            raise CommunicationError(
                f"rank {self.rank} lost contact with {error} at {where} ({purpose}); look for what that rank said"
            ) from error

    def all_gather(self, tensor: torch.Tensor, purpose: str) -> torch.Tensor:
        """Stacks the equally shaped tensors of all ranks in rank order: `[size, *tensor.shape]`, same on every rank."""
        if self.group is None:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty((self.size, *tensor.shape))
        gathered[self.rank] = tensor
        mine = gathered[self.rank]
        self.exchange(dict.fromkeys(self.peers, mine), {peer: gathered[peer] for peer in self.peers}, purpose)
        return gathered

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every rank's JSON value in rank order. For set-up and errors: text, never pickles."""
        if self.group is None:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        lengths = self.all_gather(torch.tensor([data.numel()], device=self.device), "control").flatten().tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        padded[: data.numel()] = data
        rows = self.all_gather(padded, "control").cpu()
        return [json.loads(bytes(row[:length].tolist()).decode()) for row, length in zip(rows, lengths, strict=True)]

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank."""
        return self.all_gather_json(value if self.is_first else None)[0]

    def agree(self, problem: str | None) -> None:
        """Called by all ranks after a step that may fail on one of them: raises the same RankError everywhere.

        `problem` is None where the step went well.
        """
        problems = self.all_gather_json(problem)
        failing = [(rank, text) for rank, text in enumerate(problems) if text is not None]
        if not failing:
            return
        texts: dict[str, list[int]] = {}
        for rank, text in failing:
            texts.setdefault(text, []).append(rank)
        parts = [
            text if len(ranks) == len(problems) else f"rank {ranks_text(ranks)}: {text}"
            for text, ranks in texts.items()
        ]
        raise RankError("; ".join(parts))

    def together(self, work: Callable[[], Result]) -> Result:
        """Runs rank-local `work`; where it raises ValueError or OSError on any rank, all ranks raise one RankError.

        A single process raises the error itself.
        """
        problem: str | None = None
        try:
            result = work()
        except (ValueError, OSError) as error:
            if self.group is None:
                raise
            problem = str(error)
        self.agree(problem)
        return result

    def agree_same(self, value: Any, what: str) -> None:
        """Raises the same error on all ranks unless every rank passed an equal JSON `value`."""
        values = self.all_gather_json(value)
        if any(other != values[0] for other in values):
            shown = "; ".join(f"rank {rank} has {other!r}" for rank, other in enumerate(values))
            raise RankError(f"{what} differs between ranks ({shown}); start every rank with the same arguments")

    def barrier(self) -> None:
        self.all_gather(torch.zeros(1, dtype=torch.uint8, device=self.device), "control")
