"""SymmetricMemory: a buffer on every GPU of a group that all its ranks can address, where the hardware allows it.

torch makes and maps the buffers (`torch.distributed._symmetric_memory`: over NVLink or PCIe, within one host); kernels
read and write through the addresses alone.
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

#: Gives a JSON value of every rank, in rank order: `ParallelContext.all_gather_json`.
Gather = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class SymmetricMemory:
    """Zeroed at first. own: this rank's buffer, uint8; addresses: of all ranks' buffers as this rank sees them."""

    own: torch.Tensor
    addresses: tuple[int, ...]
    #: torch's handle and views: the mappings last as long as they do
    kept: tuple[Any, ...] = ()


def why_missing(device: torch.device, group: Any, gather: Gather, share_gpus: bool = False) -> str:
    """An empty string where the ranks of `group` can address each other's GPUs, else the reason; the same on all ranks.

    A collective call. share_gpus: ranks on one GPU are fine too, which torch allows only with
    TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 in the environment; slow, for tests.
    """
    ranks = gather({"problem": _local_problem(device, group), "host": socket.gethostname(), "gpu": _gpu(device)})
    for rank, facts in enumerate(ranks):
        if facts["problem"]:
            return f"rank {rank}: {facts['problem']}"
    if len({facts["host"] for facts in ranks}) > 1:
        return f"ranks are on different hosts ({', '.join(sorted({facts['host'] for facts in ranks}))})"
    gpus = [facts["gpu"] for facts in ranks]
    if len(set(gpus)) < len(gpus) and not share_gpus:
        return f"some of the {len(gpus)} ranks share a GPU; give each its own"
    for rank, problem in enumerate(gather(_peer_problem(device, gpus))):
        if problem:
            return f"rank {rank}: {problem}"
    return ""


def allocate(nbytes: int, device: torch.device, group: Any, gather: Gather) -> SymmetricMemory:
    """A collective call: zeroed buffers of `nbytes` bytes on all ranks, tried out.

    Raises RuntimeError where torch cannot map them (all of what `why_missing` finds comes first), or where a rank does
    not read in the others' buffers what they wrote.
    """
    from torch.distributed import _symmetric_memory as symm_mem

    if not _stores_come_with_groups():
        symm_mem.enable_symm_mem_for_group(group.group_name)
    own = symm_mem.empty(nbytes, dtype=torch.uint8, device=device)
    handle = symm_mem.rendezvous(own, group.group_name)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    # torch counts from the start of an allocation, which our tensor may lie inside of
    offset = own.data_ptr() - handle.get_buffer(rank, (1,), torch.uint8).data_ptr()
    views = [handle.get_buffer(peer, (nbytes,), torch.uint8, offset) for peer in range(size)]
    own.fill_(rank + 1)
    torch.cuda.synchronize(device)
    gather(None)
    seen = [int(view[-1]) for view in views]
    gather(None)
    if seen != list(range(1, size + 1)):
        raise RuntimeError(f"rank {rank} reads {seen} in the buffers of ranks 0 to {size - 1}, not their rank plus 1")
    own.zero_()
    torch.cuda.synchronize(device)
    gather(None)  # nobody may write before all are zero
    return SymmetricMemory(own, tuple(view.data_ptr() for view in views), (handle, *views))


def control_device(group: Any, device: torch.device) -> torch.device:
    """Where tensors must be for `group` to carry them from rank to rank: gloo does not send from GPUs."""
    return torch.device("cpu") if dist.get_backend(group) == "gloo" else device


def _stores_come_with_groups() -> bool:
    """From 2.11 on a group's store is found by torch itself."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return (major, minor) >= (2, 11)


def _local_problem(device: torch.device, group: Any) -> str:
    if group is None:
        return "it has no process group, so nobody to share memory with"
    if device.type != "cuda":
        return f"tensors are on {device}; only GPUs have symmetric memory"
    if importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        return f"torch {torch.__version__} has no symmetric memory; take 2.6 or later"
    return ""


def _gpu(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else str(device)


def _peer_problem(device: torch.device, gpus: list[str]) -> str:
    """Asked of the GPUs that this process sees; of the others torch's rendezvous will tell."""
    visible = {_gpu(torch.device("cuda", index)): index for index in range(torch.cuda.device_count())}
    own = visible[_gpu(device)]
    for rank, gpu in enumerate(gpus):
        peer = visible.get(gpu, own)
        if peer != own and not torch.cuda.can_device_access_peer(own, peer):
            return f"its GPU cannot address that of rank {rank} (see nvidia-smi topo -p2p rw)"
    return ""
