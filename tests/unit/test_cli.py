"""The command line is a contract: its flags are frozen; a mistake costs its user one line, with exit code 2."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from lowbit_tools.cli import build_parser, main
from megatron_lowbit.calibration.scheme_file import is_scheme_file
from megatron_lowbit.comm.schemes import parse_scheme

README = Path(__file__).parents[2] / "README.md"
COMMAND = re.compile(r"(?:^|\s)(?:megatron-lowbit|-m lowbit_tools) ")

MODEL_FLAGS = "MODEL --dtype --tp --virtual-tp --device --backend --json"
# Adding a flag means adding it here; taking one away breaks somebody's script.
FLAGS = {
    "convert": "SRC OUT --tp --dtype --overwrite --dry-run --json",
    "reshard": "SRC OUT --tp --overwrite --json",
    "export": "CKPT OUT_DIR --max-shard-size --dtype --json",
    "verify": "CKPT --against --logits --json",
    "calibrate": f"OUT.safetensors --text --sequences --length {MODEL_FLAGS}",
    "tune-scheme": "OUT.safetensors --budget-bits --max-kl --calibration --text --sequences --length --fast --portable "
    f"{MODEL_FLAGS}",
    "generate": "--prompt --scheme --calibration --max-new-tokens --temperature --top-k --top-p --seed --stop --chat "
    f"--policy --stats {MODEL_FLAGS}",
    "eval": f"--text --schemes --calibration --windows --length --path --batch --decode-tokens {MODEL_FLAGS}",
    "eval-tasks": f"--tasks --schemes --calibration --limit --answer-prefix {MODEL_FLAGS}",
    "report": "--text --schemes --calibration --out --parts --windows --length --lengths --decode-batches "
    f"--decode-positions --layer-windows --prompts --new-tokens {MODEL_FLAGS}",
    "bench": "what --tokens --hidden --schemes --rounds --backend --policy --piece-kib --link --tp --device --json",
    "bench-model": "MODEL --config --random-weights --schemes --calibration --prompt-tokens --new-tokens --rounds "
    "--policy --dtype --tp --device --backend --json",
    "tune": "OUT --scheme --hidden --seconds --backend --tp --device --json",
    "plan": "--model --table --validate --tp --link --flops --memory-bandwidth --codec-bandwidth --overhead "
    "--torch-latency --transport --scheme --policy --prompt-tokens --batch --alone --json",
    "demo": "--model --text --out --prompt --sequences --windows --length --tp --device",
}
DEFAULTS = {
    "calibrate M C": dict(sequences=256, length=512, text=None),
    "generate M --prompt x": dict(scheme="bf16", max_new_tokens=128, temperature=0.0, top_p=1.0, seed=0, chat=False),
    "eval M --schemes bf16": dict(windows=32, length=512, text=None, calibration=None),
    "eval-tasks M --tasks T --schemes bf16": dict(limit=None, calibration=None, answer_prefix="Answer:"),
    "report M --schemes bf16": dict(windows=32, length=512, lengths="128,2048", decode_batches="1,32", prompts=50),
    "bench all-reduce": dict(tokens="1,16,128,1024", hidden=4096, policy="auto", piece_kib=0, link=None),
    "bench-model M": dict(
        schemes="bf16,int4-outlier", prompt_tokens="512,2048", new_tokens=16, rounds=5, policy="auto"
    ),
    "tune-scheme M O": dict(
        budget_bits=None, max_kl=None, calibration=None, sequences=64, length=512, fast=False, portable=False
    ),
    "tune OUT": dict(scheme="int4-outlier", hidden=4096, seconds=40.0),
    "convert S O --tp 2": dict(dtype="bf16", overwrite=False, dry_run=False),
    "export C O": dict(dtype="auto", max_shard_size="5GB"),
}


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def test_subcommands_and_flags_are_frozen() -> None:
    found = {}
    for name, parser in subcommands().items():
        actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
        found[name] = {a.option_strings[-1] if a.option_strings else str(a.metavar or a.dest) for a in actions}
    assert found == {name: {*flags.split(), "--verbose"} for name, flags in FLAGS.items()}


@pytest.mark.parametrize("line", DEFAULTS)
def test_defaults_are_frozen(line: str) -> None:
    args = build_parser().parse_args(shlex.split(line))
    assert {name: getattr(args, name) for name in DEFAULTS[line]} == DEFAULTS[line]


@pytest.mark.parametrize("name", FLAGS)
def test_help_explains_every_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for action in subcommands()[name]._actions:
        assert action.help, f"{name}: {action.dest} has no help"
        assert not action.option_strings or action.option_strings[-1] in shown


WRONG = {
    # what a user typed: what the line must say
    "": "COMMAND",
    "train": "train",
    "eval M": "--schemes",
    "eval M --schemes int9": "unknown scheme 'int9'",
    "eval M --schemes int4:two": "unknown option 'two'",
    "eval M --schemes bf16:seed=1": "seed=N",
    "eval M --schemes bf16 --text nowhere.txt": "nowhere.txt",
    "eval M --schemes bf16 --tp 2 --virtual-tp 2": "not allowed with",
    "eval M --schemes bf16 --tp 0": "--tp is 0",
    "eval M --schemes bf16 --virtual-tp -1": "--virtual-tp is -1",
    "eval M --schemes bf16 --dtype fp16": "fp16",
    "eval M --schemes bf16 --no-such-flag": "--no-such-flag",
    "eval M --schemes bf16 --batch 3": "--path decode",
    "eval M --schemes bf16 --path decode --batch 0": "--batch is 0",
    "eval M --schemes bf16 --window 3": "--window",  # half a name would stop working once a second flag begins alike
    "eval nowhere --schemes bf16": "nowhere",
    "eval-tasks M --schemes bf16": "--tasks",
    "eval-tasks M --tasks nowhere.jsonl": "--schemes",
    "eval-tasks M --tasks nowhere.jsonl --schemes bf16": "nowhere.jsonl not found",
    "eval-tasks M --tasks nowhere.jsonl --schemes bf16 --limit 0": "--limit is 0",
    "eval-tasks M --tasks nowhere.jsonl --schemes int9": "unknown scheme 'int9'",
    "report M": "--schemes",
    "report M --schemes bf16 --parts speed": "allowed: quality, lengths",
    "report M --schemes bf16 --lengths 128,x": "--lengths is '128,x'",
    "report M --schemes bf16 --decode-batches 0": "--decode-batches is '0'",
    "report M --schemes bf16 --prompts 0": "--prompts is 0",
    "report M --schemes bf16 --out nowhere/report.html": "no folder",
    "report nowhere --schemes bf16 --virtual-tp 2": "nowhere",
    "generate nowhere --prompt x": "nowhere",
    "generate M --prompt x --scheme int9": "unknown scheme 'int9'",
    "generate M --prompt x --temperature -1": "temperature",
    "generate M --prompt x --top-p 0": "top_p",
    "generate M --prompt x --max-new-tokens 0": "max_new_tokens",
    "calibrate nowhere out.safetensors --virtual-tp 2": "nowhere",
    "calibrate M out.safetensors --text nowhere.txt": "nowhere.txt",
    "convert nowhere out --tp 2": "nowhere",
    "convert nowhere --tp 2": "give OUT",
    "convert nowhere out --tp 2 --dry-run": "no OUT",
    "convert nowhere --tp 2 --dry-run": "nowhere",
    "convert nowhere --tp 2 --dry-run --dtype auto": "sees no weights",
    "reshard nowhere out --tp 2": "nowhere",
    "export nowhere out": "nowhere",
    "export nowhere out --max-shard-size 5": "--max-shard-size is '5'",
    "verify nowhere": "nowhere",
    "convert M out --tp 0": "tp",
    "convert M out": "--tp",
    "bench all-reduce --tokens 1,x": "--tokens",
    "bench all-reduce --tokens -1": "--tokens is -1",
    "bench all-reduce --hidden 0": "--hidden",
    "bench all-reduce --schemes nothing": "unknown scheme 'nothing'",
    "bench all-reduce": "--tp N",
    "bench all-reduce --link 1gb": "--link is '1gb'",
    "bench broadcast": "broadcast",
    "bench-model": "either MODEL or --config",
    "bench-model M --config c.json": "either MODEL or --config",
    "bench-model --config nowhere.json": "nowhere.json",
    "bench-model nowhere": "nowhere",
    "bench-model M --random-weights --calibration c": "--calibration",
    "bench-model M --prompt-tokens 5,x": "--prompt-tokens",
    "bench-model M --prompt-tokens 0": "--prompt-tokens is '0'",
    "bench-model M --new-tokens 1": "--new-tokens is 1",
    "bench-model M --rounds 0": "--rounds is 0",
    "bench-model M --schemes int5+int6+int7": "int5+int6+int7",
    "eval M --schemes nowhere.safetensors": "nowhere.safetensors not found",
    "generate M --prompt x --scheme nowhere.safetensors": "nowhere.safetensors not found",
    "bench-model M --schemes bf16,nowhere.safetensors": "nowhere.safetensors not found",
    "tune-scheme M O.safetensors": "either --budget-bits BITS or --max-kl",
    "tune-scheme M O.safetensors --budget-bits 4 --max-kl 0.1": "either --budget-bits BITS or --max-kl",
    "tune-scheme M O.safetensors --max-kl 0": "a positive number",
    "tune-scheme M balanced --budget-bits 4": "let it end in .safetensors",
    "tune-scheme M O.safetensors --budget-bits 4 --text nowhere.txt": "nowhere.txt",
    "tune OUT": "--tp N",
    "tune OUT --scheme int4:one-stage": "one-stage",
    "tune OUT --seconds 0": "--seconds is 0",
    "demo": "--tp 2",
    "demo --text nowhere.txt": "nowhere.txt",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_argument_costs_one_line(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    try:
        code = main(shlex.split(line))
    except SystemExit as left:  # argparse's own way
        code = left.code
    said = capsys.readouterr().err
    assert code == 2
    assert WRONG[line] in said
    assert said.startswith("megatron-lowbit") and said.count("\n") == 1, said


def test_ranks_that_differ_from_torchruns_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert main(["eval", "M", "--schemes", "bf16", "--tp", "2"]) == 2
    assert "--tp 2 differs from the 3 ranks torchrun started" in capsys.readouterr().err
    assert main(["eval", "M", "--schemes", "bf16", "--virtual-tp", "2"]) == 2
    assert "one process" in capsys.readouterr().err


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if COMMAND.search(line)]


def test_the_readme_shows_every_subcommand() -> None:
    shown = {COMMAND.split(line, maxsplit=1)[1].split()[0] for line in readme_commands()}
    assert shown >= set(FLAGS) - {"demo"}


@pytest.mark.parametrize("line", readme_commands())
def test_commands_of_the_readme_parse(line: str) -> None:
    words = COMMAND.split(line, maxsplit=1)[1]
    args = build_parser().parse_args(shlex.split(words))
    for scheme in (getattr(args, "schemes", getattr(args, "scheme", None)) or "bf16").split(","):
        assert is_scheme_file(scheme) or parse_scheme(scheme)  # the parser itself takes any text
