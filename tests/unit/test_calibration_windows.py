"""Windows of a text: as many as asked for, evenly spaced, disjoint, BOS first."""

from __future__ import annotations

import pytest

from megatron_lowbit.windows import text_windows


class Words:
    """A tokenizer whose tokens are the numbers in the text."""

    def __init__(self, adds_bos: bool = False, bos_id: int | None = None) -> None:
        self.adds_bos, self.bos_id = adds_bos, bos_id

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        prefix = [self.bos_id] if add_bos and self.adds_bos and self.bos_id is not None else []
        return prefix + [int(word) for word in text.split()]


def text_of(tokens: int) -> str:
    return " ".join(str(100 + token) for token in range(tokens))


def windows(tokens: int, count: int, length: int, tokenizer=None, at_least: int = 1) -> list[list[int]]:
    return text_windows(tokenizer or Words(), text_of(tokens), count, length, at_least, "the text")


def test_all_of_a_text():
    assert windows(9, 3, 3) == [[100, 101, 102], [103, 104, 105], [106, 107, 108]]
    assert windows(11, 3, 3) == windows(9, 3, 3), "what is left at the end makes no window"


def test_fewer_windows_are_spread_over_the_whole_text():
    # 10 windows fit; of 4 the starts are 0, 2.5, 5 and 7.5 windows in, rounded down
    assert [window[0] - 100 for window in windows(50, 4, 5)] == [0, 10, 25, 35]
    assert [window[0] - 100 for window in windows(50, 1, 5)] == [0]


def test_more_than_there_are():
    assert len(windows(50, 99, 5)) == 10


@pytest.mark.parametrize("count", range(1, 13))
def test_windows_are_disjoint_and_of_one_length(count):
    made = windows(61, count, 5)
    used = [token for window in made for token in window]
    assert len(made) == min(count, 12) and {len(window) for window in made} == {5}
    assert used == sorted(set(used))


def test_bos_comes_first_and_takes_a_place():
    made = windows(9, 2, 4, Words(adds_bos=True, bos_id=7))
    assert made == [[7, 100, 101, 102], [7, 103, 104, 105]]


@pytest.mark.parametrize("tokenizer", [Words(adds_bos=False, bos_id=7), Words(adds_bos=True, bos_id=None)])
def test_no_bos_where_the_model_has_none(tokenizer):
    assert windows(8, 2, 4, tokenizer) == [[100, 101, 102, 103], [104, 105, 106, 107]]


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match=r"the text is too short: its 14 tokens give 2 windows of 5, at least 3 are"):
        windows(14, 8, 5, at_least=3)
    assert len(windows(15, 8, 5, at_least=3)) == 3
    with pytest.raises(ValueError, match="too short"):
        windows(0, 1, 2)


@pytest.mark.parametrize(("count", "length"), [(0, 5), (-1, 5), (1, 1), (1, 0)])
def test_windows_without_meaning_are_refused(count, length):
    with pytest.raises(ValueError, match=f"{count} windows of {length} tokens"):
        windows(50, count, length)
