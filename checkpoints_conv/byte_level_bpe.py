"""Pre-tokenizers by the names that GGUF files give them.

Sources: the names are llama.cpp's; each stands for the pipeline that the model it is named after publishes in its own
tokenizer.json (gpt-4o and tekken: in tiktoken and tekken.json).
"""

from __future__ import annotations

from megatron_lowbit.tokenizer_byte_level import PreTokenizer, byte_level, split

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


# o200k's words begin with a capital at most; tekken's are the same without contractions and with single digits
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_ENDING}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_WORDS = _O200K_WORDS.replace(_ENDING, "").replace(r"\p{N}{1,3}", r"\p{N}")

_GPT2 = PreTokenizer((byte_level(True),))
PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "llama-bpe": PreTokenizer((split(_LLAMA3_WORDS), byte_level(False)), ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer((split(_QWEN2_WORDS), byte_level(False)), normalizer={"type": "NFC"}),
    "smollm": PreTokenizer(({"type": "Digits", "individual_digits": True}, byte_level(True))),
    "tekken": PreTokenizer((split(TEKKEN_WORDS), byte_level(False)), ignore_merges=True, adds_bos=True),
    "gpt-4o": PreTokenizer((split(_O200K_WORDS), byte_level(False)), ignore_merges=True),
    "dbrx": PreTokenizer((split(_LLAMA3_WORDS), byte_level(False))),  # cl100k, which Phi-4 uses
}
