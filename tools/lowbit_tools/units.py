"""Quantities as people write them: `25gbit`, `32GB/s`, `50us`, `312T`. Each reader names its flag in errors."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NUMBER = r"(\d+\.?\d*|\.\d+)"
_BYTES = {"MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12}
_BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_SIZES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_FLOPS = {"G": 1e9, "T": 1e12, "P": 1e15}


def bits_per_s(text: str, flag: str) -> float:
    """Bits a second of `1gbit` (as `tc` writes rates) or `32GB/s`; ValueError for anything else, and for 0."""
    units = _BITS | {unit: 8 * factor for unit, factor in _BYTES.items()}
    return _positive(_read(text, units, flag, "a rate such as 1gbit, 2.5gbit, 100mbit or 32GB/s"), text, flag)


def nbytes_per_s(text: str, flag: str) -> float:
    """Bytes a second of `2TB/s`; ValueError for anything else, and for 0."""
    return _positive(_read(text, _BYTES, flag, "a bandwidth such as 900GB/s or 2TB/s"), text, flag)


def nbytes(text: str, flag: str) -> int:
    """Bytes of `5GB` or `512MiB`; ValueError for anything else, and for less than 1."""
    return int(_positive(_read(text, _SIZES, flag, "a size such as 5GB or 512MiB"), text, flag))


def flops(text: str, flag: str) -> float:
    """Operations a second of `312T`; ValueError for anything else, and for 0."""
    return _positive(_read(text, _FLOPS, flag, "operations a second such as 40G, 312T or 1P"), text, flag)


def seconds(text: str, flag: str) -> float:
    """Seconds of `50us` or `0.3ms`, 0 included; ValueError for anything else."""
    return _read(text, _SECONDS, flag, "a time such as 50us or 0.3ms")


def _read(text: str, units: Mapping[str, float], flag: str, wanted: str) -> float:
    names = "|".join(re.escape(unit) for unit in units)
    found = re.fullmatch(f"{_NUMBER}({names})", text)
    if found is None:
        raise ValueError(f"{flag} is {text!r}; give {wanted}")
    return float(found[1]) * units[found[2]]


def _positive(value: float, text: str, flag: str) -> float:
    if value <= 0:
        raise ValueError(f"{flag} is {text!r}; it must be above 0")
    return value
