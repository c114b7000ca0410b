"""PickledFile: a PyTorch `.bin` file, read like a safetensors file: its table of tensors once, values when asked for.

Such a file is a zip archive: `data.pkl` describes the tensors, `data/KEY` hold their bytes, uncompressed.
torch.load(weights_only=True) would allow a little more in the pickle and read the whole file, or map it, so that every
page counts as memory and a file that is cut off meanwhile kills the process.
"""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

from megatron_lowbit.checkpoint.pickle_table import ForeignPickle, read_pickle
from megatron_lowbit.checkpoint.tensor_file import StoredTensor, TensorFile

MAX_PICKLE_NBYTES = 16_000_000
PICKLE, BYTE_ORDER, DATA = "data.pkl", "byteorder", "data/"
LOCAL_HEADER = struct.Struct("<4s22xHH")
LOCAL_MAGIC = b"PK\x03\x04"
# what zipfile and pickletools raise on damage
DAMAGE = (
    zipfile.BadZipFile, ValueError, TypeError, LookupError, EOFError, OverflowError, NotImplementedError, MemoryError,
    RuntimeError, struct.error,
)  # fmt: skip


class PickledFile(TensorFile):
    """The tensors of one `.bin` file. Nothing in it is executed.

    Raises FileNotFoundError, or ValueError naming the file: for a damaged one, one in the format before torch 1.6, and
    one that holds or asks for anything but a table of dense tensors.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such weight file; download the checkpoint again")
        super().__init__(path, _read_table(path))


def _read_table(path: Path) -> dict[str, StoredTensor]:
    try:
        with path.open("rb") as file:
            if file.read(len(LOCAL_MAGIC)) != LOCAL_MAGIC:
                raise ForeignPickle("it is no archive: damaged, or in the format before torch 1.6")
            with zipfile.ZipFile(file) as archive:
                table = read_pickle(*_opened(archive, file))
    except ForeignPickle as error:
        raise ValueError(
            f"{path}: not a file of plain weights: {error}; nothing in it was run. Use the safetensors files of this "
            "model, or save its state dict again with a torch of today, from a source you trust"
        ) from error
    except DAMAGE as error:
        what = str(error)[:200] or type(error).__name__
        raise ValueError(f"{path}: damaged or truncated PyTorch weight file: {what}; download it again") from error
    if not isinstance(table, dict):
        raise _no_table(path, f"a {type(table).__name__}")
    for name, value in table.items():
        if not isinstance(value, StoredTensor):
            raise _no_table(path, f"a {type(value).__name__} under {name[:80]!r}")
    return table


def _no_table(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path}: holds {what}, expected a table of tensors by name; take the weights out of the training checkpoint: "
        "torch.save(checkpoint['state_dict'], …)"
    )


def _opened(archive: zipfile.ZipFile, file: io.BufferedReader) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """data.pkl, and of every record behind `data/` where its bytes lie in the file: (offset, nbytes)."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if not 0 <= info.header_offset < archive.start_dir:
            raise ValueError(f"{info.filename} lies outside of the archive")
        name = info.filename.partition("/")[2]
        if name in members:
            raise ValueError(f"{info.filename} is in it twice")
        members[name] = info
    if PICKLE not in members:
        raise ForeignPickle(f"there is no {PICKLE} in the archive")
    for name in {PICKLE, BYTE_ORDER} & set(members):
        if members[name].file_size > MAX_PICKLE_NBYTES:
            raise ValueError(f"{name} has {members[name].file_size:,} bytes, at most {MAX_PICKLE_NBYTES:,} make sense")
    if BYTE_ORDER in members and archive.read(members[BYTE_ORDER]) != b"little":
        raise ForeignPickle("its numbers are not little-endian")
    records = {
        name.removeprefix(DATA): (_data_offset(archive, info, file), info.file_size)
        for name, info in members.items()
        if name.startswith(DATA)
    }
    return archive.read(members[PICKLE]), records


def _data_offset(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: io.BufferedReader) -> int:
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        raise ForeignPickle(f"{info.filename} is compressed or encrypted")
    file.seek(info.header_offset)
    magic, name_nbytes, extra_nbytes = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    offset = info.header_offset + LOCAL_HEADER.size + int(name_nbytes) + int(extra_nbytes)
    if magic != LOCAL_MAGIC or offset + info.file_size > archive.start_dir:
        raise ValueError(f"{info.filename} does not lie where the directory of the archive says")
    return offset
