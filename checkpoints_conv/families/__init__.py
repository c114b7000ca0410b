"""The model families that GGUF files are read of, by `general.architecture`."""

from __future__ import annotations

from checkpoints_conv.families.gemma import GEMMA, GEMMA2, GEMMA3
from checkpoints_conv.families.gpt_oss import GPT_OSS
from checkpoints_conv.families.llama import LLAMA
from checkpoints_conv.families.phi3 import PHI3
from checkpoints_conv.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from checkpoints_conv.families.table import GGUFFamily

FAMILIES: dict[str, GGUFFamily] = {
    family.architecture: family for family in (GEMMA, GEMMA2, GEMMA3, GPT_OSS, LLAMA, PHI3, QWEN2, QWEN3, QWEN3_MOE)
}
