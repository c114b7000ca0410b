"""Lanes: jobs in order, few ahead, and what one raises is not lost."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from helpers.stored_checkpoints import hf_config, write_checkpoint

from checkpoints_conv.convert import convert
from checkpoints_conv.lanes import BATCH_NBYTES, BATCHES_AHEAD, Lanes
from checkpoints_conv.streaming_writer import StreamingSafetensorsWriter


def test_order_and_bytes() -> None:
    done: dict[int, list[int]] = {0: [], 1: [], 2: []}
    with Lanes(3) as lanes:
        for job in range(90):
            lanes.submit(job, done[job % 3].append, job)
            lanes.handed_over(BATCH_NBYTES // 4)
        lanes.drain()
    assert all(jobs == list(range(lane, 90, 3)) for lane, jobs in done.items())
    assert lanes.done_nbytes == 90 * (BATCH_NBYTES // 4)


def test_the_caller_waits() -> None:
    """While one job is stuck, no more than the batches ahead and the one being filled are handed over."""
    gate, handed = threading.Event(), []

    def hand_over(lanes: Lanes) -> None:
        for batch in range(20):
            lanes.submit(0, gate.wait, 30)
            handed.append(batch)
            lanes.handed_over(BATCH_NBYTES)

    with Lanes(1) as lanes:
        caller = threading.Thread(target=hand_over, args=(lanes,))
        caller.start()
        caller.join(0.3)
        assert len(handed) <= BATCHES_AHEAD + 1 and caller.is_alive()
        gate.set()
        caller.join(30)
        lanes.drain()
    assert len(handed) == 20


def test_an_error_of_a_job_surfaces() -> None:
    def fail() -> None:
        raise OSError("no space left")

    with Lanes(2) as lanes, pytest.raises(OSError, match="no space left"):
        lanes.submit(1, fail)
        lanes.drain()


def test_a_disk_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "hf", hf_config("llama"))
    written: list[int] = []
    write = StreamingSafetensorsWriter._write

    def failing(self: StreamingSafetensorsWriter, data: bytes | memoryview) -> None:
        written.append(len(data))
        if len(written) == 30:
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(StreamingSafetensorsWriter, "_write", failing)
    with pytest.raises(OSError, match="No space left"):
        convert(tmp_path / "hf", tmp_path / "out", 3, torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
