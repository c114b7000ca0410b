"""Companions: what lies beside the weights and must come along: tokenizer, generation settings, licence, config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from checkpoints_conv.gguf_reader import GGUFCheckpoint
from checkpoints_conv.gguf_tokenizer import write_tokenizer
from checkpoints_conv.hf_config import config_to_hf
from megatron_lowbit.checkpoint.huggingface import HuggingFaceCheckpoint
from megatron_lowbit.checkpoint.json_file import read_json_object
from megatron_lowbit.checkpoint.reader import CheckpointReader
from megatron_lowbit.checkpoint.tensor_parallel import HF_CONFIG_FILE, TensorParallelCheckpoint

COPIED_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
COPIED_PATTERNS = ("LICENSE*", "NOTICE*")


def write_companions(reader: CheckpointReader, directory: Path) -> list[str]:
    """Tokenizer, generation settings and licence; names of what was written."""
    if isinstance(reader, GGUFCheckpoint):
        # a licence beside a lone file may be another file's, so none is taken along
        return write_tokenizer(reader.path, directory)
    found = [reader.directory / name for name in COPIED_FILES]
    for pattern in COPIED_PATTERNS:
        found += sorted(reader.directory.glob(pattern))
    written = [path.name for path in found if path.is_file()]
    for name in written:
        shutil.copyfile(reader.directory / name, directory / name)
    return written


def hf_config_of(reader: CheckpointReader) -> dict[str, Any]:
    """The config.json that transformers reads: the source's own where it had one, otherwise one made for it."""
    if isinstance(reader, HuggingFaceCheckpoint):
        return reader.hf_config
    if isinstance(reader, TensorParallelCheckpoint) and HF_CONFIG_FILE in reader.manifest.files:
        return read_json_object(reader.directory / HF_CONFIG_FILE)
    return config_to_hf(reader.config)


def write_hf_config(path: Path, hf: dict[str, Any]) -> None:
    path.write_text(json.dumps(hf, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
