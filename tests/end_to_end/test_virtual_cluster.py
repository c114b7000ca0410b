"""The virtual cluster: a real rendezvous between network namespaces, the bits of one host, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "virtual_cluster.sh"


def why_not() -> str:
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "iproute2 is not installed"
    name = f"mlbtest{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "this machine does not allow network namespaces"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


@pytest.fixture(scope="module", autouse=True)
def allowed() -> None:
    if reason := why_not():
        pytest.skip(reason)


def environment() -> dict[str, str]:
    """The interpreter of the tests first on the path: the script takes `python` from there."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def spaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith("mlb")}


@pytest.mark.parametrize(("hosts", "rate"), [(3, "1gbit"), (2, "none")])
def test_collectives_between_hosts_give_the_bits_of_the_reference(tmp_path: Path, hosts: int, rate: str) -> None:
    """`bench` compares each scheme with the reference bit for bit on every rank before it times anything."""
    out = tmp_path / "rows.json"
    schemes = "exact,bf16,int8-group,int4-group,int4-outlier,int4-outlier:one-stage"
    words = ["-m", "lowbit_tools", "bench", "all-reduce", "--tokens", "0,1,7", "--hidden", "130", "--rounds", "2"]
    done = subprocess.run(
        ["bash", SCRIPT, str(hosts), rate, "--", *words, "--schemes", schemes, "--policy", "none", "--json", out],
        capture_output=True, text=True, timeout=150, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("link probe") == 3
    written = json.loads(out.read_text())
    assert written["conditions"]["tp"] == hosts
    assert len(written["rows"]) == 3 * (1 + len(schemes.split(",")))
    assert not spaces()


def test_a_failure_on_the_hosts_is_reported_and_cleared_away() -> None:
    words = ["-m", "lowbit_tools", "bench", "all-reduce", "--schemes", "int9"]
    done = subprocess.run(
        ["bash", SCRIPT, "2", "none", "--", *words], capture_output=True, text=True, timeout=150, env=environment()
    )
    assert done.returncode != 0
    assert "unknown scheme 'int9'" in done.stderr
    assert not spaces()


def test_ctrl_c_clears_away() -> None:
    words = ["-m", "lowbit_tools", "bench", "all-reduce", "--tokens", "64", "--rounds", "1000000"]
    process = subprocess.Popen(
        ["bash", SCRIPT, "2", "1gbit", "--", *words],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment(), start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("link probe:  16384"):
            break
    os.killpg(process.pid, signal.SIGINT)
    process.stdout.read()
    assert process.wait(timeout=60) != 0
    assert not spaces()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["1", "none", "--", "x"], "HOSTS is '1'"),
        (["2", "fast", "--", "x"], "RATE is 'fast'"),
        (["2", "1gbit", "x", "y"], "usage"),
    ],
)
def test_arguments_that_make_no_sense(words: list[str], says: str) -> None:
    done = subprocess.run(["bash", SCRIPT, *words], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
