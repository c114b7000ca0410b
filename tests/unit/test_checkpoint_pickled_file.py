"""PyTorch's own weight files: the tensors torch.load(weights_only=True) finds; nothing that is in one runs."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lowbit.checkpoint.huggingface import HuggingFaceCheckpoint
from megatron_lowbit.checkpoint.pickled_file import PickledFile
from megatron_lowbit.checkpoint.reader import check_complete
from megatron_lowbit.models.registry import config_from_hf, tensor_sources

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


def saved(path: Path, data: Any, **options: Any) -> Path:
    torch.save(data, path, **options)
    return path


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {str(dtype): torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in DTYPES}
    whole = torch.randn(6, 7, 4, generator=generator)
    return made | {
        "whole": whole,
        "rows of another": whole[2:5],
        "turned": whole.permute(2, 0, 1),
        "the same again": whole,
        "flat": torch.randn(30).t(),
        "empty": torch.empty(0, 4),
        "number": torch.tensor(2.5),
        "one row": whole[:1].transpose(0, 2),
        "parameter": torch.nn.Parameter(torch.randn(4)),
    }


def test_equals_torch(tmp_path: Path) -> None:
    table = OrderedDict(tensors())
    table._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    path = saved(tmp_path / "w.bin", table)
    expected = torch.load(path, weights_only=True)
    file = PickledFile(path)
    assert list(file.tensors) == list(expected)
    for name, tensor in expected.items():
        assert file.tensors[name].dtype == tensor.dtype and file.tensors[name].shape == tensor.shape
        assert torch.equal(file.read(name), tensor), name
        for dim, extent in enumerate(tensor.shape):
            span = file.read_span(name, dim, extent // 3, extent)
            assert span.is_contiguous() and torch.equal(span, tensor.narrow(dim, extent // 3, extent - extent // 3))
            span.zero_()  # belongs to the caller
        assert torch.equal(file.read(name), tensor), name


class Evil:
    """Unpickled, it would leave a mark."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a command": (lambda mark: {"w": Evil(__import__("os").system, f"touch {mark}")}, r"asks for 'posix\.system'"),
    "eval": (lambda mark: Evil(eval, f"open({str(mark)!r}, 'w')"), r"asks for '(builtins|__builtin__)\.eval'"),
    "a module": (lambda mark: torch.nn.Linear(2, 2), r"asks for 'torch\.nn\.modules\.linear\.Linear'"),
    "a number": (lambda mark: {"w": torch.ones(2), "epoch": 3}, r"holds a int under 'epoch'"),
    "a table inside": (lambda mark: {"state_dict": {"w": torch.ones(2)}}, r"holds a dict under 'state_dict'"),
    "a list": (lambda mark: [torch.ones(2)], "holds a list, expected a table"),
    "a lone tensor": (lambda mark: torch.ones(2), "holds a StoredTensor, expected a table"),
    "numbered": (lambda mark: {3: torch.ones(2)}, "a table has a int for a name"),
    "a sparse tensor": (lambda mark: {"w": torch.eye(3).to_sparse()}, "asks for 'torch._utils._rebuild_sparse_tensor'"),
    "an expanded tensor": (lambda mark: {"w": torch.ones(1).expand(5)}, "leaves its storage of 1 values"),
    "a column": (lambda mark: {"w": torch.ones(4, 4)[:, :2]}, "is a view of another"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_anything_else_is_refused_and_never_run(tmp_path: Path, what: str) -> None:
    make, message = FOREIGN[what]
    mark = tmp_path / "mark"
    path = saved(tmp_path / "w.bin", make(mark))
    with pytest.raises(ValueError, match=message) as caught:
        PickledFile(path)
    assert "w.bin" in str(caught.value) and not mark.exists()


def test_a_dict_that_holds_itself(tmp_path: Path) -> None:
    table: dict[str, Any] = {"w": torch.ones(2)}
    table["self"] = table
    with pytest.raises(ValueError, match="holds a dict under 'self'"):
        PickledFile(saved(tmp_path / "w.bin", table))


def test_older_formats(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.bin", {"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
    mark = tmp_path / "mark"
    for data in (path.read_bytes(), pickle.dumps(Evil(eval, f"open({str(mark)!r}, 'w')")), b"", b"ustar" * 200):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"no archive: damaged, or in the format before torch 1\.6"):
            PickledFile(path)
    assert not mark.exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        PickledFile(tmp_path / "nowhere.bin")


def rewritten(path: Path, change: Callable[[dict[str, bytes]], object], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with its members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def pickled(members: dict[str, bytes], *instructions: bytes) -> None:
    members["w/data.pkl"] = b"\x80\x02" + b"".join(instructions) + b"."


DAMAGED: dict[str, tuple[Callable[[dict[str, bytes]], object], str]] = {
    "no pickle": (lambda m: m.pop("w/data.pkl"), "no data.pkl"),
    "no storage": (lambda m: m.pop("w/data/0"), "a storage that is not there"),
    "a short storage": (lambda m: m.update({"w/data/0": b"1234"}), r"storage 0 has 4 bytes, expected 12 values"),
    "big-endian": (lambda m: m.update({"w/byteorder": b"big"}), "not little-endian"),
    "half a pickle": (lambda m: m.update({"w/data.pkl": m["w/data.pkl"][:40]}), "weight file"),
    "an empty pickle": (lambda m: m.update({"w/data.pkl": b""}), "weight file"),
    "nothing on the stack": (lambda m: pickled(m), "weight file"),
    "an unknown instruction": (lambda m: m.update({"w/data.pkl": b"\xff\xff"}), "weight file"),
    "a class of its own": (lambda m: pickled(m, b"cos\nsystem\n", b"X\x01\x00\x00\x00a", b"\x85", b"R"), "os.system"),
    "an old instruction": (lambda m: pickled(m, b"(S'touch mark'\nios\nsystem\n"), "the instruction STRING"),
    "an extension": (lambda m: pickled(m, b"\x82\x01"), "the instruction EXT1"),
    "deep": (lambda m: pickled(m, b")", b"\x85" * 100_000), "holds a tuple"),
    "a deep name": (lambda m: pickled(m, b"})", b"\x85" * 100_000, b"Ns"), "a table has a tuple for a name"),
    "twice": (lambda m: pickled(m, b"}", *[b"X\x01\x00\x00\x00aNs"] * 2), "'a' stands there twice"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_archives(tmp_path: Path, what: str) -> None:
    change, message = DAMAGED[what]
    path = saved(tmp_path / "w.bin", {"w": torch.ones(3, 4)})
    with pytest.raises(ValueError, match=message):
        PickledFile(rewritten(path, change))


def test_a_far_place_in_the_memo_costs_nothing(tmp_path: Path) -> None:
    """Python's unpickler makes an array as long as the largest place."""
    path = saved(tmp_path / "w.bin", {"w": torch.ones(3, 4)})
    assert PickledFile(rewritten(path, lambda members: pickled(members, b"}r\xff\xff\xff\x7f"))).tensors == {}


def test_compressed_and_repeated_members(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.bin", {"w": torch.zeros(300, 4)})
    rewritten(path, lambda members: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed or encrypted"):
        PickledFile(path)
    path = saved(tmp_path / "w.bin", {"w": torch.zeros(300, 4)})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("w/data/0", b"other")
    with pytest.raises(ValueError, match="is in it twice"):
        PickledFile(path)


@given(cut=st.floats(0, 1), at=st.floats(0, 1), value=st.integers(0, 255))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutations_end_in_value_errors(tmp_path: Path, cut: float, at: float, value: int) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}, buffer)
    data = bytearray(buffer.getvalue())
    data[int(at * (len(data) - 1))] = value
    path = tmp_path / "w.bin"
    path.write_bytes(data[: len(data) - int(cut * 64)] if value % 2 else data)
    try:
        file = PickledFile(path)
        for name in file.tensors:
            file.read(name)
    except ValueError as error:
        assert "w.bin" in str(error)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_of_bin_files(tmp_path: Path, shards: int) -> None:
    config = dict(
        model_type="llama",
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=9,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    sources = tensor_sources(config_from_hf(config, "test"))
    made = {name: torch.randn(source.shape) for name, source in sources.items()}
    if shards == 1:
        torch.save(made, tmp_path / "pytorch_model.bin")
    else:
        weight_map = {name: f"pytorch_model-{index % shards}.bin" for index, name in enumerate(made)}
        for file in set(weight_map.values()):
            torch.save({name: made[name] for name in made if weight_map[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    reader = HuggingFaceCheckpoint(tmp_path)
    check_complete(reader, tensor_sources(reader.config))
    for name, tensor in made.items():
        assert torch.equal(reader.read(name), tensor)
