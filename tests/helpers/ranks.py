"""RankGroup: real tensor-parallel processes over gloo, kept alive so that many cases share the price of starting them.

A case is a function in an importable module (`helpers.*`) that takes a ParallelContext and JSON arguments, and returns
a dictionary. Its tensors come back in a safetensors file, the rest as JSON: nothing is unpickled from a rank.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_lowbit.parallel import ParallelContext

#: After one rank raised, the others wait for it in a collective: they get this long to fail by themselves.
GRACE_S = 5.0
START_S = 60.0


class RanksFailed(AssertionError):
    """Some rank raised, died or hung; the text holds what each of them was doing."""


class RankGroup:
    """`size` processes with one gloo group. A group whose ranks failed is started anew by the next `run`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._started = 0
        self._calls = 0
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []

    def run(self, case: Callable[..., dict[str, Any]], timeout_s: float = 120.0, **arguments: Any) -> list[dict]:
        """What `case(context, **arguments)` returned on each rank, in rank order.

        Raises RanksFailed with every rank's traceback where one of them raised, died, or took longer than `timeout_s`.
        """
        if not self._processes:
            self._start()
        self._calls += 1
        folder = Path(self._folder.name) / f"call-{self._calls}"
        folder.mkdir()
        order = json.dumps([case.__module__, case.__qualname__, arguments, str(folder)])
        for pipe in self._pipes:
            pipe.send_bytes(order.encode())
        replies = self._replies(time.monotonic() + timeout_s)
        if any("error" in reply for reply in replies):
            self._fail(replies, f"{case.__qualname__} on {self.size} ranks, limit {timeout_s:g} s")
        results = []
        for rank, reply in enumerate(replies):
            file = folder / f"rank-{rank}.safetensors"
            results.append(reply["result"] | (load_file(file) if file.exists() else {}))
            file.unlink(missing_ok=True)
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # end of file: the process leaves its loop
        self._stop(wait_s=5.0)
        self._folder.cleanup()

    def _start(self) -> None:
        # a server process that has imported torch once is forked for each rank: 0.1 s instead of 3 s
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["torch", "torch.distributed", "safetensors.torch", "megatron_lowbit.llm"])
        self._started += 1
        store = Path(self._folder.name) / f"store-{self._started}"
        for rank in range(self.size):
            self._log(rank).touch()
            here, there = processes.Pipe()
            process = processes.Process(
                target=_serve, args=(there, rank, self.size, str(store), str(self._log(rank))), daemon=True
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        replies = self._replies(time.monotonic() + START_S)
        if any("error" in reply for reply in replies):
            self._fail(replies, f"start of {self.size} ranks")

    def _replies(self, deadline: float) -> list[dict[str, Any]]:
        replies: dict[int, dict[str, Any]] = {}
        while len(replies) < self.size:
            waiting = {self._pipes[rank]: rank for rank in range(self.size) if rank not in replies}
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                for rank in waiting.values():
                    replies[rank] = {"error": "did not answer in time"}
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    replies[rank] = json.loads(pipe.recv_bytes())
                except EOFError:
                    replies[rank] = {"error": f"died with exit code {self._exit_code(rank)}"}
                if "error" in replies[rank]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return [replies[rank] for rank in range(self.size)]

    def _exit_code(self, rank: int) -> int | None:
        self._processes[rank].join(1.0)
        return self._processes[rank].exitcode

    def _fail(self, replies: list[dict[str, Any]], what: str) -> None:
        for rank, reply in enumerate(replies):
            if reply.get("error") == "did not answer in time":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._processes[rank].pid, signal.SIGUSR1)  # its stack goes to its log
        time.sleep(0.5)
        logs = [self._log(rank).read_text(errors="replace")[-4000:] for rank in range(self.size)]
        self._stop(wait_s=0.0)
        parts = [
            f"--- rank {rank}: {reply.get('error', 'finished')}\n{log}"
            for rank, (reply, log) in enumerate(zip(replies, logs, strict=True))
        ]
        raise RanksFailed(f"{what}\n" + "\n".join(parts))

    def _stop(self, wait_s: float) -> None:
        for process in self._processes:
            process.join(wait_s)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank-{rank}.log"


def _serve(pipe: connection.Connection, rank: int, size: int, store: str, log: str) -> None:
    """One rank: joins the group, then runs cases until the pipe closes."""
    with open(log, "w", buffering=1) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        faulthandler.register(signal.SIGUSR1, file=output, all_threads=True)
        torch.set_num_threads(1)
        # the environment that torchrun gives; the rendezvous goes through a file, since ports race
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)})
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
            )
            context = ParallelContext.from_environment("cpu")
        except BaseException:
            pipe.send_bytes(json.dumps({"error": traceback.format_exc()}).encode())
            raise
        pipe.send_bytes(b"{}")
        while True:
            try:
                module, name, arguments, folder = json.loads(pipe.recv_bytes())
            except EOFError:
                break
            pipe.send_bytes(json.dumps(_answer(context, module, name, arguments, Path(folder))).encode())
        context.close()


def _answer(
    context: ParallelContext, module: str, name: str, arguments: dict[str, Any], folder: Path
) -> dict[str, Any]:
    try:
        case = getattr(importlib.import_module(module), name)
        context.traffic.reset()
        result = case(context, **arguments)
        tensors = {key: value.contiguous() for key, value in result.items() if isinstance(value, torch.Tensor)}
        if tensors:
            save_file(tensors, folder / f"rank-{context.rank}.safetensors")
        return {"result": {key: value for key, value in result.items() if key not in tensors}}
    except BaseException as error:
        # whatever it is, pytest's process must hear of it and of where it happened
        sys.stderr.write(traceback.format_exc())
        return {"error": f"{type(error).__name__}: {error}"}


class RankGroups:
    """`groups(3)` is the group of 3 ranks, started when it is first used."""

    def __init__(self) -> None:
        self._groups: dict[int, RankGroup] = {}

    def __call__(self, size: int) -> RankGroup:
        if size not in self._groups:
            self._groups[size] = RankGroup(size)
        return self._groups[size]

    def close(self) -> None:
        for group in self._groups.values():
            group.close()
