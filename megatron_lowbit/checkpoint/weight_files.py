"""Where the tensors of a Hugging Face folder lie: one file or several with an index, safetensors or PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_lowbit.checkpoint.json_file import is_plain_name, read_json_object
from megatron_lowbit.checkpoint.pickled_file import PickledFile
from megatron_lowbit.checkpoint.safetensors_file import SafetensorsFile
from megatron_lowbit.checkpoint.tensor_file import TensorFile

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Format:
    """The names that transformers gives to the files of a format, and who reads them."""

    single: str
    index: str
    ending: str
    open: Callable[[Path], TensorFile]


# safetensors first: a folder that has both holds the same weights twice
FORMATS = (
    _Format(SINGLE_FILE, INDEX_FILE, ".safetensors", SafetensorsFile),
    _Format("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin", PickledFile),
)


def locate_tensors(directory: Path) -> dict[str, TensorFile]:
    """The file that holds each tensor. Raises FileNotFoundError or ValueError naming the file at fault."""
    for kind in FORMATS:
        if (directory / kind.single).is_file():
            file = kind.open(directory / kind.single)
            return dict.fromkeys(file.tensors, file)
        if (directory / kind.index).is_file():
            return _read_index(directory / kind.index, kind)
    raise FileNotFoundError(
        f"{directory}: neither {' nor '.join(name for kind in FORMATS for name in (kind.single, kind.index))}; "
        "download the weights of the model"
    )


def _read_index(path: Path, kind: _Format) -> dict[str, TensorFile]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: expected a 'weight_map' from tensors to files; download the file again")
    files: dict[str, TensorFile] = {}
    for name in weight_map.values():
        if not is_plain_name(name) or not name.endswith(kind.ending):
            raise ValueError(
                f"{path}: {name!r} is not a plain {kind.ending} file name inside the folder; do not use this checkpoint"
            )
        if name not in files:
            files[name] = kind.open(path.parent / name)
    located = {tensor: files[name] for tensor, name in weight_map.items()}
    for tensor, file in located.items():
        if tensor not in file.tensors:
            raise ValueError(
                f"{path}: tensor {tensor} is not in {file.path.name}; download that file and the index again"
            )
    for file in files.values():
        for tensor in file.tensors:
            other = located.setdefault(tensor, file)
            if other is not file:
                raise ValueError(
                    f"{path}: tensor {tensor} is in {other.path.name} and in {file.path.name}; which one is right "
                    "cannot be told, download both files and the index again"
                )
    return located
