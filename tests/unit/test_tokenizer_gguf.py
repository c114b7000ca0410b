"""The tokenizer inside a GGUF: written out, it encodes as the tokenizer that the GGUF was made of."""

import io
import json
import os
import random
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from checkpoints_conv.gguf_tokenizer import write_tokenizer
from megatron_lowbit.tokenizer import Tokenizer

CORPUS = (
    "The quick brown fox jumps over the lazy dog 1234567890 times, in 2024 and 2025. It doesn't stop; THEY'LL!\n"
    "def main(x):\n        return x ** 2   # squares\n\n\n日本語のテキスト、漢字とかな。 Ünïcödé naïve café é.\n"
)
HARD_TEXTS = [
    "",
    "  two  spaces 12345 in   2024",
    "12 345 6789\t1\n 2\r\n\r\n  3",
    "THEY'LL don't we'Ve 'RE",
    "日本語 café e\u0301 😀👨‍👩‍👧 ½ ٣٤٥",
    "\x00\x01\u200b \ufeff",
    "x" * 2000,
    "<s><|end|>a b</s>",
]
PATTERNS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
PATTERNS["dbrx"] = PATTERNS["llama-bpe"]


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name in PATTERNS:
        split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[name]), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]) if name == "smollm" else level
    )


def byte_level(name: str) -> tuple[tokenizers.Tokenizer, list[str]]:
    """A tokenizer trained with the pre-tokenizer of that name, and its merges as GGUF writes them."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(name)
    tokenizer.decoder = decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS] * 5, trainer)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens(["a b"])
    model = tokenizer.model.__getstate__().decode("utf-8")
    merges = [" ".join(merge) for merge in json.loads(model)["merges"]]
    return tokenizer, merges


def write_gguf(path: Path, model: str, tokens, types, named=None, **fields) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(model)
    if tokens is not None:
        writer.add_token_list(tokens)
    if types is not None:
        writer.add_token_types(types)
    for name, token_id in {"bos": 0, "eos": 1, **(named or {})}.items():
        getattr(writer, f"add_{name}_token_id")(token_id)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level_gguf(path: Path, name: str, **fields) -> tokenizers.Tokenizer:
    tokenizer, merges = byte_level(name)
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    types = [{"<s>": 3, "</s>": 3, "<|end|>": 3, "a b": 4}.get(token, 1) for token in tokens]
    write_gguf(path, "gpt2", tokens, types, tokenizer_pre=name, token_merges=merges, **fields)
    return tokenizer


@pytest.mark.parametrize("name", ["smollm", "gpt-2", "default", *PATTERNS])
def test_byte_level_round_trip(tmp_path, name):
    oracle = byte_level_gguf(tmp_path / "m.gguf", name, add_bos_token=False, chat_template="{{ messages }}")
    assert write_tokenizer(tmp_path / "m.gguf", tmp_path / "out") == ["tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    ours = Tokenizer.from_directory(tmp_path / "out")
    assert (ours.bos_id, ours.eos_ids, ours.adds_bos, ours.chat_template) == (0, (1,), False, "{{ messages }}")
    transformed = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*HARD_TEXTS, CORPUS]:
        ids = oracle.encode(text).ids
        assert ours.encode(text, parse_special=True) == ids
        assert transformed(text).input_ids == ids
        assert ours.decode(ids, skip_special=False) == oracle.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
        ("smollm", {}, False),
        ("smollm", {"add_bos_token": True}, True),
    ],
)
def test_bos_is_added_where_the_file_says_so(tmp_path, name, fields, expected):
    byte_level_gguf(tmp_path / "m.gguf", name, **fields)
    write_tokenizer(tmp_path / "m.gguf", tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    assert ours.adds_bos is expected
    assert (ours.encode("fox")[0] == 0) is expected
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("fox").input_ids == ours.encode("fox")


def test_the_word_splitting_matters(tmp_path):
    """What a reader that ignores tokenizer.ggml.pre gets wrong: the spaces before digits."""
    byte_level_gguf(tmp_path / "a.gguf", "smollm")
    byte_level_gguf(tmp_path / "b.gguf", "llama-bpe")
    for name in "ab":
        write_tokenizer(tmp_path / f"{name}.gguf", tmp_path / name)
    text = "in   2024"
    split = [Tokenizer.from_directory(tmp_path / name)._backend._parsing.pre_tokenizer for name in "ab"]
    words = [[word for word, _ in step.pre_tokenize_str(text)] for step in split]
    assert words == [["in", "ĠĠĠ", "2", "0", "2", "4"], ["in", "ĠĠ", "Ġ", "202", "4"]]


def train_sentencepiece(prefix: bool) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 5),
        model_writer=model,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["a▁b", "<tool>"],
        control_symbols=["<|end|>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def piece_type(model: sentencepiece.SentencePieceProcessor, token_id: int) -> int:
    if model.is_unknown(token_id):
        return 2
    if model.is_control(token_id):
        return 3
    return 6 if model.is_byte(token_id) else 4 if model.id_to_piece(token_id) in ("a▁b", "<tool>") else 1


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_round_trip(tmp_path, prefix):
    oracle = train_sentencepiece(prefix)
    count = oracle.vocab_size()
    types = [piece_type(oracle, i) for i in range(count)]
    assert types.count(4) == 2 and types.count(6) == 256
    # Converters write user-defined pieces with plain spaces.
    tokens = [oracle.id_to_piece(i).replace("▁", " ") if types[i] == 4 else oracle.id_to_piece(i) for i in range(count)]
    write_gguf(
        tmp_path / "m.gguf",
        "llama",
        tokens,
        types,
        {"bos": 1, "eos": 2, "unk": 0},
        token_scores=[oracle.get_score(i) for i in range(count)],
        add_space_prefix=prefix,
    )
    assert write_tokenizer(tmp_path / "m.gguf", tmp_path / "out") == ["tokenizer.model", "tokenizer_config.json"]
    written = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    ours = Tokenizer.from_directory(tmp_path / "out")
    assert (ours.bos_id, ours.eos_ids, ours.adds_bos) == (1, (2,), True)
    picker = random.Random(0)
    texts = ["".join(picker.choices(CORPUS + " ab\x00😀", k=30)) for _ in range(200)]
    for text in [*HARD_TEXTS, CORPUS, *texts]:
        assert written.encode(text) == oracle.encode(text)
        assert ours.encode(text) == [1, *oracle.encode(text)]
        assert ours.decode(oracle.encode(text)) == oracle.decode(oracle.encode(text))


def test_gemma_lists_its_unknown_token_among_the_control_tokens(tmp_path):
    oracle = train_sentencepiece(False)
    count = oracle.vocab_size()
    types = [3 if i == 0 else piece_type(oracle, i) for i in range(count)]
    scores = [oracle.get_score(i) for i in range(count)]
    tokens = [oracle.id_to_piece(i) for i in range(count)]
    named = {"bos": 1, "eos": 2, "unk": 0}
    write_gguf(tmp_path / "m.gguf", "llama", tokens, types, named, token_scores=scores, add_space_prefix=False)
    write_tokenizer(tmp_path / "m.gguf", tmp_path)
    written = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert written.unk_id() == 0 and written.is_unknown(0)
    for text in HARD_TEXTS:
        assert written.encode(text) == oracle.encode(text)


@pytest.mark.parametrize(
    ("model", "tokens", "types", "fields", "reason"),
    [
        ("bert", ["a", "b"], [1, 1], {}, "supported are 'gpt2'"),
        ("gpt2", ["a", "b"], [1, 1], {"tokenizer_pre": "unheard-of"}, "'llama-bpe', 'qwen2', 'smollm', 'tekken'"),
        ("gpt2", ["a", "b"], [1, 1], {}, "tokenizer.ggml.pre is None"),
        (
            "gpt2",
            ["a", "b"],
            [1, 1],
            {"tokenizer_pre": "gpt-2", "token_merges": ["a b"]},
            "makes 'ab', which is no token",
        ),
        ("gpt2", ["a", "b"], [1, 1], {"tokenizer_pre": "gpt-2", "token_merges": ["ab"]}, "not two tokens"),
        ("gpt2", ["a", "a"], [1, 1], {"tokenizer_pre": "gpt-2"}, "lists token 'a' again as id 1"),
        ("gpt2", ["a", "b"], [1], {"tokenizer_pre": "gpt-2"}, "2 tokens and 1 token types"),
        ("gpt2", ["a"], [1], {"tokenizer_pre": "gpt-2"}, "names token id 1 as eos"),
        ("gpt2", None, None, {}, "lists 0 tokens"),
        ("llama", ["a", "b"], [1, 1], {}, "0 scores for 2"),
        ("llama", ["a", "b"], [1, 1], {"token_scores": [0.0, 0.0]}, "contradicts itself"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, model, tokens, types, fields, reason):
    write_gguf(tmp_path / "m.gguf", model, tokens, types, **fields)
    with pytest.raises(ValueError, match=reason):
        write_tokenizer(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        write_tokenizer(tmp_path / "none.gguf", tmp_path)
    byte_level_gguf(tmp_path / "m.gguf", "gpt-2")
    whole = (tmp_path / "m.gguf").read_bytes()
    for content in (b"", b"GGUF", b"nonsense" * 100, whole[: len(whole) // 2]):
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(ValueError, match="GGUF file"):
            write_tokenizer(tmp_path / "m.gguf", tmp_path / "out")


def test_demo_model_against_transformers(tmp_path):
    """transformers reads the same GGUF but ignores tokenizer.ggml.pre, so digits are split by hand before comparing."""
    path = os.environ.get("MLB_DEMO_GGUF")
    if not path:
        pytest.skip("MLB_DEMO_GGUF does not name the demo model's GGUF file")
    write_tokenizer(Path(path), tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    oracle = transformers.AutoTokenizer.from_pretrained(Path(path).parent, gguf_file=Path(path).name)
    oracle.backend_tokenizer.pre_tokenizer = pre_tokenizer("smollm")
    picker = random.Random(0)
    texts = ["".join(picker.choices(CORPUS + "  0123\x00😀ﬁΩ", k=40)) for _ in range(300)]
    for text in [*HARD_TEXTS, CORPUS, *texts, "<|im_start|>user\nHi 42<|im_end|>\n"]:
        ids = oracle(text).input_ids
        assert ours.encode(text, parse_special=True) == ids
        assert ours.decode(ids, skip_special=False) == oracle.decode(ids, clean_up_tokenization_spaces=False)
