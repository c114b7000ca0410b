"""JSON files that came from elsewhere: objects only, no key twice, and errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_JSON_NBYTES = 100_000_000


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError naming the file for anything else."""
    if path.stat().st_size > MAX_JSON_NBYTES:
        raise ValueError(
            f"{path}: {path.stat().st_size:,} bytes of JSON, at most {MAX_JSON_NBYTES:,} make sense here; download the "
            "file again"
        )
    try:
        data = parse_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download the file again") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}; download the file again")
    return data


def parse_json(text: bytes) -> Any:
    """The value; ValueError (of several kinds) or RecursionError where it is damaged or names a key twice."""
    return json.loads(text, object_pairs_hook=_without_repetition)


def is_plain_name(name: object) -> bool:
    """Whether `name` names a file directly inside a folder: no separators, no `..`, nothing absolute."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0:")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} stands there twice")
            seen.add(key)
    return table
