"""`plan` as it is typed: quantities and configs that it reads, what it refuses, rows measured beside modelled."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lowbit_tools import units
from lowbit_tools.all_reduce_bench import BASELINE
from lowbit_tools.cli import main
from lowbit_tools.commands.plan import parse_link
from lowbit_tools.plan_collectives import ring_time
from lowbit_tools.plan_model import Machine, pass_time, scheme_pass
from lowbit_tools.plan_shapes import ModelShape, read_shape, shape_of_config
from megatron_lowbit.comm.policy import default_policy
from megatron_lowbit.comm.schemes import parse_scheme
from megatron_lowbit.config import ModelConfig

CONFIG = dict(
    model_type="llama", hidden_size=96, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
    intermediate_size=200, vocab_size=300,
)  # fmt: skip
OURS = ModelConfig("llama", 96, 200, 2, 6, 2, 16, 300, 4096, 1e-5, 1e4, True)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved(**changes)`: CONFIG with changes (None: without that key) as a file."""

    def save(**changes: Any) -> Path:
        path = tmp_path / "a-model" / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({key: value for key, value in (CONFIG | changes).items() if value is not None}))
        return path

    return save


@pytest.mark.parametrize(
    ("reader", "text", "expected"),
    [
        (units.bits_per_s, "1gbit", 1e9), (units.bits_per_s, "2.5gbit", 2.5e9), (units.bits_per_s, "100mbit", 1e8),
        (units.bits_per_s, "32GB/s", 256e9), (units.bits_per_s, ".5kbit", 500.0),
        (units.nbytes_per_s, "1.5TB/s", 1.5e12), (units.flops, "312T", 3.12e14), (units.flops, "40G", 4e10),
        (units.seconds, "50us", 50e-6), (units.seconds, "0ms", 0.0), (units.seconds, "2s", 2.0),
    ],
)  # fmt: skip
def test_quantities(reader: Callable[[str, str], float], text: str, expected: float) -> None:
    assert reader(text, "--flag") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        *((units.bits_per_s, text) for text in ("1", "1gb", "gbit", "-1gbit", "1 gbit", "1Gbit", "0gbit", "infgbit")),
        *((units.nbytes_per_s, text) for text in ("1gbit", "900", "0GB/s", "GB/s")),
        *((units.flops, text) for text in ("312", "0T", "1TFLOP", "nanT")),
        *((units.seconds, text) for text in ("50", "50u", "-1us", "us")),
    ],
)
def test_quantities_that_are_none(reader: Callable[[str, str], float], text: str) -> None:
    with pytest.raises(ValueError, match="--flag is"):
        reader(text, "--flag")


def test_a_link_is_a_rate_and_perhaps_a_latency() -> None:
    link = parse_link("25gbit,50us")
    assert link.nbytes_per_s == 25e9 / 8 and link.latency_s == pytest.approx(50e-6) and link.overlaps
    assert parse_link("32GB/s").nbytes_per_s == 32e9 and parse_link("32GB/s").latency_s == 0.0
    for wrong in ("25gbit,", "25gbit,50", "25gbit,1us,2us", ",50us", ""):
        with pytest.raises(ValueError, match="--link"):
            parse_link(wrong)


SHAPE = ModelShape("a-model", 96, 2, 6, 2, 16, 200, 300)


def test_a_config_of_any_dense_family(saved: Callable[..., Path]) -> None:
    """The runtime need not know the family; the folder will do as well as the file."""
    assert read_shape(saved(model_type="somebody-elses")) == SHAPE
    assert read_shape(saved().parent) == SHAPE
    assert read_shape(saved(tie_word_embeddings=True)).tied
    assert read_shape(saved(head_dim=32)).head_dim == 32
    assert read_shape(saved(num_key_value_heads=None)).kv_heads == 6
    assert read_shape(saved(num_experts=None)) == read_shape(saved(num_experts=0)) == SHAPE
    gemma = read_shape(saved(model_type="gemma2"))
    assert gemma.tied and not read_shape(saved(model_type="gemma2", tie_word_embeddings=False)).tied
    assert not read_shape(saved(model_type="phi")).gated and gemma.gated


def test_the_language_part_of_a_config_that_nests_it(saved: Callable[..., Path]) -> None:
    path = saved()
    path.write_text(json.dumps({"model_type": "sees-too", "text_config": CONFIG, "vision_config": {}}))
    assert read_shape(path) == SHAPE


def test_the_config_of_a_converted_checkpoint(saved: Callable[..., Path]) -> None:
    path = saved()
    path.write_text(OURS.to_json())
    assert read_shape(path.parent) == shape_of_config(OURS, "a-model")
    assert read_shape(path).tied


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_local_experts": 8}, "num_local_experts is 8; mixtures of experts"),
        ({"n_routed_experts": 64}, "mixtures of experts"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"num_key_value_heads": 4}, "6 query heads cannot share 4"),
    ],
)
def test_configs_that_cannot_be_planned(saved: Callable[..., Path], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match="config") as raised:
        read_shape(saved(**changes))
    assert says in str(raised.value)


MACHINE = "--link 1gbit,100us --flops 100G --memory-bandwidth 10GB/s"
WRONG = {
    "plan": "--model",
    "plan --model {config}": "--model needs --tp, --link, --flops, --memory-bandwidth too",
    f"plan --model {{config}} --tp 2 {MACHINE} --alone x.json": "--model has no use for --alone",
    f"plan --model {{config}} --tp 0 {MACHINE}": "--tp is 0",
    f"plan --model {{config}} --tp 2 --batch 0 {MACHINE}": "--batch is 0",
    f"plan --model {{config}} --tp 2 --prompt-tokens 0 {MACHINE}": "--prompt-tokens is '0'",
    f"plan --model {{config}} --tp 2 --scheme int99 {MACHINE}": "int99",
    f"plan --model {{config}} --tp 2 --policy nowhere.json {MACHINE}": "nowhere.json",
    f"plan --model nowhere --tp 2 {MACHINE}": "nowhere",
    "plan --model {config} --tp 2 --link 1gb --flops 1T --memory-bandwidth 1TB/s": "--link is '1gb'",
    "plan --model {config} --tp 2 --link 0gbit --flops 1T --memory-bandwidth 1TB/s": "--link is '0gbit'",
    "plan --model {config} --tp 2 --link 1gbit,5 --flops 1T --memory-bandwidth 1TB/s": "--link latency is '5'",
    "plan --model {config} --tp 2 --link 1gbit --flops 0T --memory-bandwidth 1TB/s": "--flops is '0T'",
    "plan --model {config} --tp 2 --link 1gbit --flops 1T --memory-bandwidth 1TB": "--memory-bandwidth is '1TB'",
    f"plan --model {{config}} --tp 2 --codec-bandwidth fast {MACHINE}": "--codec-bandwidth is 'fast'",
    "plan --table --link 1gbit": "--table has no use for --link",
    "plan --table --model x": "not allowed with",
    "plan --validate nowhere.json --link 1gbit": "nowhere.json not found",
    "plan --validate {config} --link 1gbit": "does not hold rows of",
    "plan --validate {config}": "--link",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_argument_costs_one_line(
    line: str, saved: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    try:
        code = main(shlex.split(line.format(config=saved())))
    except SystemExit as left:  # argparse's own way
        code = left.code
    said = capsys.readouterr().err
    assert code == 2 and WRONG[line] in said and said.count("\n") == 1, said


@pytest.mark.parametrize("ranks", [1, 3, 5, 7])
def test_a_plan_is_printed_and_written_as_modelled(
    ranks: int, saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    assert main(shlex.split(f"plan --model {saved()} --tp {ranks} --prompt-tokens 5,64 {MACHINE} --json {out}")) == 0
    shown = capsys.readouterr().out
    assert shown.count("MODELLED") == 2 and "Nothing here is measured" in shown
    written = json.loads(out.read_text())
    assert written["conditions"]["modelled"] and written["conditions"]["tp"] == ranks
    assert written["conditions"]["codec_nbytes_per_s"] == 5e9
    assert [row["prompt_tokens"] for row in written["rows"]] == [5, 64]
    assert all(row["modelled"] and row["tp"] == ranks for row in written["rows"])


def test_the_table_states_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--table"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("Llama-3.1-405B", "25 Gbit Ethernet", "data sheet", "Assumed latency a stage", "MODELLED"):
        assert part in shown


FLOPS, MEMORY, CODEC = 2e10, 5e9, 1e9
LINK = "100mbit,200us"


def measured_file(path: Path, ranks: int, rows: list[dict[str, Any]], **changes: Any) -> Path:
    conditions = dict(
        tp=ranks, hosts=1, device="cpu (x)", cpu_count=2, threads_per_rank=1, overlaps=True, dtype="bf16", model="m",
        config=asdict(OURS), policy=default_policy(ranks).to_json() if ranks > 1 else None,
        codec_nbytes_per_s={"bf16": CODEC, "int4-outlier": CODEC} if ranks == 1 else None,
    )  # fmt: skip
    path.write_text(json.dumps({"conditions": conditions | changes, "rows": rows}))
    return path


def row_of(scheme: str, ttft_s: float, step_s: float) -> dict[str, Any]:
    return dict(scheme=scheme, prompt_tokens=64, new_tokens=10, ttft_s=ttft_s, step_s=step_s)


@pytest.fixture
def ideal(tmp_path: Path) -> tuple[Path, Path]:
    """Rows of a machine that behaves exactly as the model says: three ranks on two cores, and one rank alone."""
    shape = shape_of_config(OURS, "m")
    (share,) = shape.shares(1)
    alone = row_of("one rank", share.flops(1, 64, 0) / FLOPS, share.read_nbytes(1, 1, 69) / MEMORY)
    machine = Machine(FLOPS, MEMORY, CODEC, parse_link(LINK)).shared_by(1.5)
    rows = []
    for name in (BASELINE, "bf16", "int4-outlier", "int4-outlier, policy"):
        times = []
        for tokens, start in ((64, 0), (1, 69)):
            if name == BASELINE:
                ring = ring_time(tokens, shape.hidden, 3, machine.link)
                times.append(pass_time(shape, 3, machine, ring, 1, tokens, start).seconds)
                continue
            scheme, policy = name.removesuffix(", policy"), default_policy(3) if name.endswith("policy") else None
            times.append(scheme_pass(shape, 3, machine, parse_scheme(scheme), policy, 1, tokens, start).seconds)
        rows.append(row_of(name, *times))
    assert len({row["step_s"] for row in rows}) == 4  # each is another way to communicate
    return measured_file(tmp_path / "alone.json", 1, [alone]), measured_file(tmp_path / "three.json", 3, rows)


def validated(tmp_path: Path, line: str) -> list[dict[str, Any]]:
    out = tmp_path / "validated.json"
    assert main([*shlex.split(line), "--json", str(out)]) == 0
    return list(json.loads(out.read_text())["rows"])


def test_validation_finds_no_error_where_there_is_none(
    ideal: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the rates of one rank alone, and with the same rates given."""
    alone, measured = ideal
    given = f"--flops {FLOPS / 1e9}G --memory-bandwidth {MEMORY / 1e9}GB/s --codec-bandwidth {CODEC / 1e9}GB/s"
    for rates in (f"--alone {alone}", given):
        for row in validated(tmp_path, f"plan --validate {measured} --link {LINK} {rates}"):
            assert row["ttft_error"] == pytest.approx(0, abs=1e-9) and row["step_error"] == pytest.approx(0, abs=1e-9)
    shown = " ".join(capsys.readouterr().out.split())
    assert "MODELLED beside measured" in shown and "divided by 1.5" in shown and "+0 % and +0 %" in shown


def test_validation_shows_the_errors_there_are(ideal: tuple[Path, Path], tmp_path: Path) -> None:
    alone, measured = ideal
    rows = validated(tmp_path, f"plan --validate {measured} --link 10mbit,200us --alone {alone}")
    assert all(row["ttft_error"] > 0.5 for row in rows)
    rows = validated(tmp_path, f"plan --validate {measured} --link {LINK} --alone {alone} --flops 1G")
    assert all(row["ttft_error"] > 1 and row["step_error"] < 0.5 for row in rows)


def test_validation_refuses_what_does_not_belong_together(
    ideal: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, measured = ideal
    row = json.loads(alone.read_text())["rows"]
    other = measured_file(tmp_path / "other.json", 1, row, config=asdict(OURS) | {"num_layers": 3})
    mute = measured_file(tmp_path / "mute.json", 1, row, codec_nbytes_per_s={"bf16": 1e9})
    for flags, says in {
        f"--validate {measured} --link 1gbit": "--flops, --memory-bandwidth, --codec-bandwidth: give them, or --alone",
        f"--validate {measured} --link 1gbit --alone {measured}": "3 ranks; give rows of one rank",
        f"--validate {alone} --link 1gbit --alone {alone}": "one rank: nothing was sent",
        f"--validate {measured} --link 1gbit --alone {other}": "in the model's shape",
        f"--validate {measured} --link 1gbit --alone {mute}": "no codec speed of 'int4-outlier'",
    }.items():
        assert main(["plan", *shlex.split(flags)]) == 2
        assert says in capsys.readouterr().err
