"""Name tables of the model families, by GGUF architecture."""

from __future__ import annotations

from checkpoints_conv.families.llama import LLAMA
from checkpoints_conv.families.table import GGUFFamily

FAMILIES: dict[str, GGUFFamily] = {family.architecture: family for family in (LLAMA,)}
