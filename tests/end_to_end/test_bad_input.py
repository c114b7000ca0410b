"""What goes wrong is said in one line that names it and the way out, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.command_line import Workshop, call, errors

from megatron_lowbit import CommCalibration

SECONDS_TO_END = 60  # imports of torch by three processes on a busy machine are most of it


def copied(workshop: Workshop, tmp_path: Path) -> Path:
    return Path(shutil.copytree(workshop.tp2, tmp_path / "tp2"))


def lose(folder: Path) -> None:
    (folder / "rank-01-of-02.safetensors").unlink()


def truncate(folder: Path) -> None:
    path = folder / "rank-01-of-02.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def alter(folder: Path) -> None:
    path = folder / "rank-01-of-02.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [(lose, "no such file"), (truncate, "expected"), (alter, "SHA-256")],
)
def test_a_damaged_checkpoint(workshop: Workshop, tmp_path: Path, damage, says) -> None:
    folder = copied(workshop, tmp_path)
    damage(folder)
    done = call("generate", folder, "--prompt", "Once", "--tp", 2, code=2)
    (line,) = errors(done)
    assert "rank-01-of-02.safetensors" in line and says in line and "convert" in line
    assert "Traceback" not in done.stderr


def other_model(path: Path) -> None:
    replace(CommCalibration.load(path), fingerprint="0" * 64).save(path)


def other_version(path: Path) -> None:
    data = path.read_bytes()
    assert data.count(b'"version":"3"') == 1
    path.write_bytes(data.replace(b'"version":"3"', b'"version":"9"'))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [(other_model, "another model"), (other_version, "version '9'"), (cut, "damaged"), (remove, "not found")],
)
def test_a_calibration_that_does_not_fit(workshop: Workshop, tmp_path: Path, damage, says) -> None:
    path = tmp_path / "calibration.safetensors"
    shutil.copy(workshop.calibration, path)
    damage(path)
    flags = ["--prompt", "Once", "--scheme", "int4", "--calibration", path]
    (line,) = errors(call("generate", workshop.tp2, *flags, "--tp", 2, code=2))
    assert says in line and "calibrate" in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval", "{tp2}", "--schemes", "int9", "--tp", 2], "unknown scheme 'int9': no format is called 'int9'"),
        (["eval", "{tp2}", "--schemes", "bf16,bf16", "--tp", 2], "name each scheme once"),
        (["eval", "{tp2}", "--schemes", "bf16", "--text", "{short}", "--virtual-tp", 2], "too short"),
        (["calibrate", "{tp2}", "{out}", "--text", "{short}", "--virtual-tp", 2], "at least 16"),
        (["calibrate", "{tp2}", "{out}", "--text", "{nowhere}", "--tp", 2], "give a UTF-8 text file"),
        (["calibrate", "{tp2}", "{out}", "--text", "{binary}", "--virtual-tp", 2], "not UTF-8"),
        (["generate", "{tp2}", "--prompt", "x" * 300, "--tp", 2], "context holds 256"),
        (["generate", "{tp2}", "--prompt", "x", "--tp", 0], "--tp is 0; it must be at least 1"),
        (["generate", "{nowhere}", "--prompt", "x", "--tp", 2], "nowhere"),
        (["generate", "{hf}", "--prompt", "x", "--top-p", 0], "top_p is 0.0"),
        (["generate", "{hf}", "--prompt", "x", "--chat"], "no chat template"),
        (["convert", "{hf}", "{tp2}", "--tp", 2], "overwrite"),
        (["bench", "all-reduce"], "at least 2 ranks"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_arguments_that_make_no_sense(workshop: Workshop, tmp_path: Path, words, says) -> None:
    (tmp_path / "short.txt").write_text("A few words.")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xd8" * 100)
    places = {
        "tp2": workshop.tp2, "hf": workshop.hf, "short": tmp_path / "short.txt", "binary": tmp_path / "binary",
        "nowhere": tmp_path / "nowhere", "out": tmp_path / "out.safetensors",
    }  # fmt: skip
    done = call(*(str(word).format(**places) for word in words), code=2)
    (line,) = errors(done)
    assert says in line
    assert "Traceback" not in done.stderr and not places["out"].exists()


def start_ranks(words: list[list[object]], port: int) -> list[subprocess.Popen[str]]:
    """One process a list of words, as a cluster's own launcher would start them: through the environment alone."""
    processes = []
    for rank, own in enumerate(words):
        environment = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": str(len(words)), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "lowbit_tools", *map(str, own)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        )
    return processes


def finished(processes: list[subprocess.Popen[str]]) -> list[subprocess.CompletedProcess[str]]:
    try:
        outputs = [process.communicate(timeout=SECONDS_TO_END) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_rank_started_with_other_arguments(workshop: Workshop) -> None:
    common = ["generate", workshop.tp2, "--max-new-tokens", 3, "--prompt"]
    first, second = finished(start_ranks([[*common, "Once"], [*common, "Twice"]], free_port()))
    assert (first.returncode, second.returncode) == (2, 2)
    (line,) = errors(first)
    assert "the command line differs between ranks" in line and "Once" in line and "Twice" in line


def test_a_port_in_use(workshop: Workshop) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = ["generate", workshop.tp2, "--prompt", "Once"]
        processes = start_ranks([words, words], taken.getsockname()[1])
        try:
            _, stderr = processes[0].communicate(timeout=SECONDS_TO_END)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    assert processes[0].returncode == 2
    assert "could not join the process group" in stderr and "is the port free" in stderr and "Traceback" not in stderr


@pytest.fixture
def long_text(workshop: Workshop, tmp_path: Path) -> Path:
    text = tmp_path / "long.txt"
    text.write_text("Words upon words upon words. " * 20_000)
    return text


def wait_for(stream, mark: str) -> None:
    for line in stream:
        if line.startswith(mark):
            return
    raise AssertionError(f"the output ended without {mark!r}")


def test_a_rank_that_is_killed_ends_the_others(workshop: Workshop, tmp_path: Path, long_text: Path) -> None:
    words = ["calibrate", workshop.tp2, tmp_path / "out.safetensors", "--text", long_text, "--length", 8]
    words += ["--sequences", 100_000]
    first, second = start_ranks([words, words], free_port())
    assert first.stderr is not None
    wait_for(first.stderr, "calibrating")
    began = time.monotonic()
    second.kill()
    (done, _) = finished([first, second])
    assert time.monotonic() - began < 10  # detection is immediate; the rest is the interpreter's way out
    assert done.returncode == 2
    assert any("lost contact with rank 1" in line for line in done.stderr.splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.txt"]


@pytest.mark.parametrize("ranks", [["--tp", "2"], ["--virtual-tp", "2"]], ids=["tp", "virtual"])
def test_ctrl_c_leaves_nothing_behind(workshop: Workshop, tmp_path: Path, long_text: Path, ranks) -> None:
    words = ["calibrate", workshop.tp2, tmp_path / "out.safetensors", "--text", long_text, "--length", 8]
    process = subprocess.Popen(
        [sys.executable, "-m", "lowbit_tools", *map(str, words), "--sequences", "100000", *ranks],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        wait_for(process.stderr, "calibrating")
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=SECONDS_TO_END)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr.count("interrupted") == 1 and "Traceback" not in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.txt"]


def test_the_same_calibration_runs_again_after_an_interruption(workshop: Workshop, tmp_path: Path) -> None:
    """What a killed run may leave is only a file that no run reads."""
    out = tmp_path / "calibration.safetensors"
    (tmp_path / f".{out.name}.123.tmp").write_bytes(b"half")
    flags = ["--text", workshop.text, "--sequences", 16, "--length", 32]
    call("calibrate", workshop.tp2, out, *flags, "--virtual-tp", 2, "--json", tmp_path / "facts.json")
    assert CommCalibration.load(out).sequences == 16
    assert json.loads((tmp_path / "facts.json").read_text())["rows"][0]["sequences"] == 16
