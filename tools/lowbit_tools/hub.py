"""resolve_model: what a user calls a model, as a path: a directory, a GGUF file, or an id of the Hugging Face hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PATTERNS = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "LICENSE*")


def resolve_model(name: str) -> Path:
    """Path of a local model, or of the hub snapshot of `name`, fetched where it is not cached yet.

    Raises FileNotFoundError where there is neither, saying what was tried.
    """
    local = Path(name)
    if local.exists():
        return local
    if name.count("/") != 1 or name.startswith(("/", ".")):
        raise FileNotFoundError(f"model {name}: no such directory or file, and not a hub id of the form owner/name")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise FileNotFoundError(
            f"model {name}: no such directory; for hub models install the extra: pip install 'megatron-lowbit[hub]'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"model {name}: no such directory, and the hub did not give it ({type(error).__name__}); check the id, the "
            "network, and whether the model asks for `hf auth login`"
        ) from error
