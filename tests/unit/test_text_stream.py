"""TextStream: whatever the ids, the pieces together are the decoded text, and no piece has to be taken back."""

import io

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from megatron_lowbit.text_stream import TextStream
from megatron_lowbit.tokenizer import Tokenizer
from megatron_lowbit.tokenizer_backends import JsonBackend, SentencePieceBackend

BYTES = [f"<0x{value:02X}>" for value in range(256)]
WORDS = ["▁", "▁▁", "▁a", "b", "ab", "▁b", "\n", "é", "日", "</stop", "▁▁▁"]


def sentencepiece_tokenizer(folder) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b ab ba  stop é日 END"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return Tokenizer(SentencePieceBackend(path, {}, {}), {}, [], None)


def byte_level_tokenizer(folder) -> Tokenizer:
    """Every byte is a token; some pairs too, also across characters; one special, one added token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encoded = [
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(w)[0][0] for w in "é日😀"
    ]
    pairs = [word[:2] for word in encoded] + [encoded[1][1:] + encoded[2][:1]]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*alphabet, *pairs]))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added(tokenizer, folder / "level.json")


def byte_fallback_tokenizer(folder) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(["<unk>", *BYTES, *WORDS])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return _with_added(tokenizer, folder / "fallback.json")


def _with_added(tokenizer: tokenizers.Tokenizer, path) -> Tokenizer:
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save(str(path))
    return Tokenizer(JsonBackend(path.read_text(encoding="utf-8"), path, {}), {}, [], None)


BUILDERS = [sentencepiece_tokenizer, byte_level_tokenizer, byte_fallback_tokenizer]


@pytest.fixture(scope="module", params=BUILDERS, ids=lambda build: build.__name__)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return request.param(tmp_path_factory.getbasetemp())


def stream(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    text_stream = TextStream(tokenizer, stops)
    pieces = [text_stream.push(token_id) for token_id in ids]
    return [*pieces, text_stream.finish()], text_stream


def cut(text: str, stops: tuple[str, ...]) -> str:
    """Read letter by letter until a stop string is complete."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - len(max(found, key=len))]
    return text


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    text = st.text(st.sampled_from("ab \né日😀\ufffd\x00▁Ω"), max_size=8).map(
        lambda t: tokenizer.encode(t, add_bos=False)
    )
    token = st.integers(0, tokenizer.vocab_size + 1).map(lambda i: [i])
    return st.lists(st.one_of(text, token), max_size=12).map(lambda parts: [i for part in parts for i in part])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_are_the_decoded_text(tokenizer, data):
    ids = data.draw(ids_of(tokenizer))
    pieces, text_stream = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not text_stream.stopped


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stop_strings_cut_the_decoded_text(tokenizer, data):
    ids = data.draw(ids_of(tokenizer))
    stops = tuple(data.draw(st.lists(st.text(st.sampled_from("ab é日\ufffd"), min_size=1, max_size=4), max_size=3)))
    pieces, text_stream = stream(tokenizer, ids, stops)
    text = tokenizer.decode(ids)
    assert "".join(pieces) == cut(text, stops)
    assert text_stream.stopped == any(stop in text for stop in stops)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=30))
def test_no_piece_breaks_a_character(tokenizer, text):
    ids = tokenizer.encode(text, add_bos=False)
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert sum(piece.count("\ufffd") for piece in pieces) == tokenizer.decode(ids).count("\ufffd")


def test_text_comes_as_soon_as_it_is_certain(tmp_path):
    tokenizer = byte_fallback_tokenizer(tmp_path)
    emoji = [1 + value for value in "😀".encode()]
    a, b = (257 + WORDS.index(word) for word in ("▁a", "b"))
    assert stream(tokenizer, [a, *emoji, b])[0] == ["a", "", "", "", "😀", "b", ""]
    assert stream(tokenizer, [a, emoji[0], b])[0] == ["a", "", "\ufffdb", ""]
    assert stream(tokenizer, [a, b, b], ("bc",))[0] == ["a", "", "b", "b"]
    assert stream(tokenizer, [a, b, b], ("bb",))[0] == ["a", "", "", ""]


def test_after_the_stop_nothing_comes(tmp_path):
    tokenizer = byte_fallback_tokenizer(tmp_path)
    b = 257 + WORDS.index("b")
    text_stream = TextStream(tokenizer, ["bb"])
    assert [text_stream.push(b) for _ in range(4)] == ["", "", "", ""]
    assert text_stream.stopped and text_stream.finish() == ""


def test_the_window_stays_short(tmp_path):
    class Counting:
        decoded = 0

        def decode(self, ids, skip_special=True):
            self.decoded += len(ids)
            return tokenizer.decode(ids, skip_special)

    tokenizer = byte_fallback_tokenizer(tmp_path)
    ids = tokenizer.encode("ab a b 日 é\n😀" * 500, add_bos=False)
    counting = Counting()
    assert "".join(stream(counting, ids)[0]) == tokenizer.decode(ids)
    assert counting.decoded < 10 * len(ids)


@pytest.mark.parametrize("stops", ["END", ["a", ""]])
def test_bad_stop_strings(stops):
    with pytest.raises(ValueError, match="stop_strings"):
        TextStream(None, stops)
