"""SafetensorsFile: headers that are damaged, contradict the file or hold what we do not read."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lowbit.checkpoint.safetensors_file import SafetensorsFile


def with_length(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


HEADERS = {
    "empty": b"",
    "short": b"\x05",
    "huge length": (1 << 60).to_bytes(8, "little") + b"{}",
    "not json": with_length(b"abcd"),
    "a list": with_length(b"[]"),
    "deep": with_length(b"[" * 60000),
    "no offsets": with_length(b'{"a":{"dtype":"F32"}}'),
    "negative": with_length(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}'),
    "wrong size": with_length(b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', bytes(8)),
    "overlap": with_length(
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        bytes(8),
    ),
    "impossible": with_length(b'{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}'),
    "many dimensions": with_length(b'{"a":{"dtype":"U8","shape":[' + b"1," * 99 + b'1],"data_offsets":[0,1]}}', b"0"),
    "a huge number": with_length(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', bytes(8)
    ),
    "twice": with_length(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"0",
    ),
    "trailing": with_length(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(8)),
}


@pytest.mark.parametrize("what", HEADERS)
def test_damaged_safetensors_headers(tmp_path: Path, what: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(HEADERS[what])
    with pytest.raises(ValueError, match=r"w\.safetensors: damaged or truncated safetensors file"):
        SafetensorsFile(path)


def test_unknown_type(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "w.safetensors").write_bytes(with_length(header, b"0"))
    with pytest.raises(ValueError, match=r"tensor a has the data type 'F4'"):
        SafetensorsFile(tmp_path / "w.safetensors")
