"""The fuzzer of the readers, for some seconds: damage ends in a clear error, in bounded time and memory.

Longer: python tests/fuzz/fuzz_readers.py --minutes 10
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FUZZER = Path(__file__).parents[1] / "fuzz" / "fuzz_readers.py"


def test_damaged_files_end_in_clear_errors() -> None:
    done = subprocess.run(
        [sys.executable, FUZZER, "--rounds", "600", "--seed", "11"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("600 damaged checkpoints")
    for kind in ("safetensors", "experts", "bin", "single-bin", "ours", "gguf"):
        assert f"{kind}: ValueError" in done.stdout


def test_the_fuzzer_can_fail(tmp_path: Path) -> None:
    """With a reader that lets another error out, it ends with the damage that did it."""
    code = (
        "import sys, runpy, megatron_lowbit.checkpoint.json_file as module\n"
        "def broken(text): raise KeyError('broken')\n"
        "import megatron_lowbit.checkpoint.safetensors_file as user\n"
        "import checkpoints_conv.convert\n"
        "good, count = user.parse_json, [0]\n"
        "def parse(text):\n"
        "    count[0] += 1\n"
        "    return good(text) if count[0] < 20 else broken(text)\n"
        "user.parse_json = parse\n"
        f"sys.argv = ['fuzz', '--rounds', '100', '--keep', {str(tmp_path / 'kept')!r}]\n"
        f"runpy.run_path({str(FUZZER)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "KeyError: 'broken'" in done.stderr and "of seed 0:" in done.stderr
    assert any((tmp_path / "kept").iterdir())
