"""Streamed counts equal whole-text counts, at every point, for a bounded amount of work."""

from __future__ import annotations

import pytest
import regex  # type: ignore[import-untyped]
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metering.ranks import NAMES, encoding
from metering.token_counter import (
    _LAST_BOUNDARY,
    PIECE_CHARS_MAX,
    SCAN_CHARS,
    TAIL_CHARS_MAX,
    StreamCounter,
    count_text,
    encoding_name,
    utf8_bytes,
)

# What the two patterns treat specially: blanks of all kinds, line breaks, suffixes, case, marks, digits, slashes,
# punctuation, scripts without blanks, title case, ligature-like letters, controls, special-token text, surrogates.
NASTY = [
    *(
        " ",
        "  ",
        "\t",
        "\n",
        "\r",
        "\r\n",
        "\n\n",
        " \n",
        "\x0b",
        "\x0c",
        "\x85",
        "\u00a0",
        "\u2028",
        "\u3000",
        "\u200b",
    ),
    *(
        "a",
        "b",
        "Z",
        "the",
        " The",
        "HTTPServer",
        "'s",
        "'S",
        "'re",
        "'",
        "'ll",
        "\u017f",
        "\u212a",
        "ß",
        "é",
        "e\u0301",
    ),
    *(
        "1",
        "23",
        "4567",
        "²",
        "Ⅷ",
        "٣",
        "一",
        "\u3007",
        "/",
        "//",
        "_",
        "__",
        "-",
        "!",
        "?!",
        "{",
        "}",
        '"',
        ":",
        "=",
        ".",
    ),
    *(",", "(", ")", "[", "]", "\\n", "<|endoftext|>", "\x00", "\x1f", "\u0301", "\u02b0", "\u01c5", "ก", "ำ"),
    *(
        "\u3000",
        "\u200b",
        "e\u0301",
        "=",
        ".",
        "你",
        "好",
        "\uff0c",
        "。",
        "、",
        "「",
        "ア",
        "ー",
        "々",
        "한",
        "🎉",
        "👩\u200d👩",
        "\ud83d",
        "\ude00",
    ),
]
PIECES = st.lists(st.sampled_from(NASTY), max_size=60)
LONG = st.tuples(st.sampled_from(NASTY), st.integers(1, 700)).map(lambda pair: pair[0] * pair[1])
TEXTS = st.lists(st.one_of(PIECES.map("".join), LONG), max_size=6).map("".join)


class CountingEncoder:
    """tiktoken's Encoding, counting what it is asked."""

    def __init__(self, name: str = "o200k_base") -> None:
        self._encoding = encoding(name)
        self.calls = 0
        self.characters = 0
        self.longest = 0

    def encode_ordinary(self, text: str) -> list[int]:
        self.calls += 1
        self.longest = max(self.longest, len(text))
        self.characters += len(text)
        return self._encoding.encode_ordinary(text)


def cut(text: str, sizes: list[int]) -> list[str]:
    deltas, at, turn = [], 0, 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        deltas.append(text[at : at + size])
        at, turn = at + size, turn + 1
    return deltas


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=120, deadline=None)
@given(text=TEXTS, sizes=st.lists(st.integers(1, 400), min_size=1, max_size=5), look=st.integers(1, 9))
def test_any_chunking_counts_like_the_whole_text_at_every_point(
    name: str, text: str, sizes: list[int], look: int
) -> None:
    encode, counter, so_far = encoding(name), StreamCounter(encoding(name)), ""
    for number, delta in enumerate(cut(text, sizes)):
        counter.feed(delta)
        so_far += delta
        if number % look == 0:
            exact = count_text(encode, so_far)
            assert counter.upper() >= exact
            assert counter.total() == exact
            assert counter.upper() == exact
    assert counter.total() == count_text(encode, text)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=300, deadline=None)
@example(pieces=["!", "\n", "/", "a", "/"])
@example(pieces=["it", "'s", "b", ",", "'", "s"])
@example(pieces=["a", " ", " ", "\n", " ", "b", "\t", "c"])
@example(pieces=["a", "1", "23", "4567", "b", "²", "一", "。"])
@given(pieces=st.lists(st.sampled_from(NASTY), min_size=2, max_size=40))
def test_every_boundary_is_where_the_encodings_own_pattern_starts_a_piece(name: str, pieces: list[str]) -> None:
    text = "".join(pieces).replace("\ud83d", "").replace("\ude00", "")
    pattern = regex.compile(encoding(name)._pat_str)
    whole = pattern.findall(text)
    found = (_LAST_BOUNDARY.match(text[:end]) for end in range(2, len(text) + 1))
    for at in {match.end() for match in found if match}:
        assert pattern.findall(text[:at]) + pattern.findall(text[at:]) == whole, (text, at)


def test_the_bound_forgets_a_tail_that_was_finished() -> None:
    counter = StreamCounter(encoding("o200k_base"))
    counter.feed("abcdefghij")
    counter.total()
    counter.feed(" a" * SCAN_CHARS)
    assert counter.upper() - counter.total() <= 1


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.sampled_from(NASTY), max_size=80), size=st.integers(1, 9))
def test_the_bound_holds_after_an_exact_count_too(name: str, pieces: list[str], size: int) -> None:
    counter, so_far = StreamCounter(encoding(name)), ""
    for number, delta in enumerate(cut("".join(pieces), [size])):
        before = counter.upper()
        grown = counter.feed(delta)
        so_far += delta
        assert counter.upper() <= before + grown + 8
        assert counter.upper() >= count_text(encoding(name), so_far)
        if number % 5 == 0:
            counter.total()


@pytest.mark.parametrize("first_look", [True, False])
def test_a_tail_is_finished_with_all_its_tokens_by_a_boundary_behind_it(first_look: bool) -> None:
    counter, encode = StreamCounter(encoding("o200k_base")), encoding("o200k_base")
    pieces = ["ab" * 20, "cd" * SCAN_CHARS, " " + "ef" * SCAN_CHARS, " gh", " ij"]
    for number, piece in enumerate(pieces):
        counter.feed(piece)
        if (number == 0 and first_look) or number >= 2:
            assert counter.total() == count_text(encode, "".join(pieces[: number + 1]))


def test_characters_are_tokenised_about_once() -> None:
    encoder = CountingEncoder()
    text = "It's 12 o'clock; the HTTPServer answers:\n  {'a': [1, 2]}\n你好\uff0c世界。\n" * 500
    counter = StreamCounter(encoder)
    for delta in cut(text, [4]):
        counter.feed(delta)
    assert counter.total() == count_text(encoding("o200k_base"), text)
    assert encoder.characters <= 1.01 * len(text)
    assert encoder.calls <= len(text) / SCAN_CHARS + 2


@pytest.mark.parametrize("run", ["a", "=", " ", "\n", "你", "🎉", "\u0301", "_"])
def test_a_run_without_a_boundary_is_tokenised_once_at_the_end(run: str) -> None:
    encoder = CountingEncoder()
    text, counter = run * 8000, StreamCounter(encoder)
    for delta in cut(text, [3]):
        counter.feed(delta)
        counter.upper()
    assert encoder.calls == 0
    assert counter.total() == count_text(encoding("o200k_base"), text)
    assert counter.total() == counter.upper()
    assert encoder.calls == 1


def test_a_tail_beyond_its_bound_is_dropped_and_the_count_stays_within_a_few_tokens() -> None:
    encoder, sizes = CountingEncoder(), [5, 7, 300]
    text, counter = "ab" * (5 * TAIL_CHARS_MAX), StreamCounter(encoder)
    for delta in cut(text, sizes):
        counter.feed(delta)
        assert sum(map(len, counter._held + counter._fresh)) <= TAIL_CHARS_MAX + SCAN_CHARS + max(sizes)
    cuts = len(text) // TAIL_CHARS_MAX
    assert abs(counter.total() - count_text(encoding("o200k_base"), text)) <= 4 * cuts
    assert encoder.characters <= len(text)


def test_chinese_prose_without_blanks_does_not_grow_a_tail() -> None:
    text, counter = "我们今天去公园散步\uff0c天气很好。" * 300, StreamCounter(encoding("o200k_base"))
    for delta in cut(text, [2]):
        counter.feed(delta)
        assert sum(map(len, counter._held + counter._fresh)) <= 2 * SCAN_CHARS
    assert counter.total() == count_text(encoding("o200k_base"), text)


def test_special_token_text_counts_as_ordinary_text() -> None:
    counter = StreamCounter(encoding("o200k_base"))
    counter.feed("<|endoftext|>")
    assert counter.total() == count_text(encoding("o200k_base"), "<|endoftext|>") > 1


def test_a_surrogate_pair_that_arrives_in_halves_is_one_character() -> None:
    counter = StreamCounter(encoding("o200k_base"))
    counter.feed("\ud83c")
    assert counter.upper() == 3 >= counter.total() == count_text(encoding("o200k_base"), "\ufffd")
    counter.feed("\udf89")
    assert counter.total() == count_text(encoding("o200k_base"), "🎉")


def test_a_copy_goes_its_own_way() -> None:
    one = StreamCounter(encoding("o200k_base"))
    one.feed("shared ")
    two = one.copy()
    one.feed("text goes on")
    assert two.total() == count_text(encoding("o200k_base"), "shared ")
    assert one.total() == count_text(encoding("o200k_base"), "shared text goes on")


def test_nothing_fed_is_nothing_counted() -> None:
    counter = StreamCounter(encoding("o200k_base"))
    counter.feed("")
    assert (counter.total(), counter.upper(), count_text(encoding("o200k_base"), "")) == (0, 0, 0)


def test_bytes_bound_tokens_for_lone_surrogates_too() -> None:
    assert [utf8_bytes(text) for text in ("abc", "é", "🎉", "\ud83d")] == [3, 2, 4, 3]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-4", "cl100k_base"),
        ("gpt-4-0613", "cl100k_base"),
        ("gpt-4-turbo-2024-04-09", "cl100k_base"),
        ("openai/gpt-4:free", "cl100k_base"),
        ("GPT-3.5-turbo", "cl100k_base"),
        ("ft:gpt-3.5-turbo:org::id", "cl100k_base"),
        ("text-embedding-3-small", "cl100k_base"),
        ("text-embedding-ada-002", "cl100k_base"),
        ("gpt-4o-mini", "o200k_base"),
        ("ft:gpt-4o:org::id", "o200k_base"),
        ("gpt-4.1-nano", "o200k_base"),
        ("gpt-4.5-preview", "o200k_base"),
        ("chatgpt-4o-latest", "o200k_base"),
        ("gpt-5.6-luna", "o200k_base"),
        ("gpt-6.1-sol", "o200k_base"),
        ("o3-mini", "o200k_base"),
        ("a model nobody knows", "o200k_base"),
    ],
)
def test_models_use_the_encoding_of_their_family(model: str, name: str) -> None:
    assert encoding_name(model) == name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run", [" ", "\t", "\n", "a", "=", "你", " \n"])
def test_a_run_of_megabytes_is_counted_in_pieces_and_raises_nothing(name: str, run: str) -> None:
    text, encoder = run * (2_000_000 // len(run)), CountingEncoder(name)
    whole = count_text(encoder, text)
    assert encoder.longest <= PIECE_CHARS_MAX
    assert encoder.characters == len(text)
    counter = StreamCounter(encoder)
    counter.feed(text)
    assert encoder.longest <= PIECE_CHARS_MAX
    assert abs(counter.total() - whole) <= 4 * (len(text) // PIECE_CHARS_MAX + 1)
    block = count_text(encoder, text[:PIECE_CHARS_MAX])
    assert abs(whole - block * len(text) / PIECE_CHARS_MAX) <= 4 * (len(text) // PIECE_CHARS_MAX + 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_long_text_with_boundaries_is_counted_exactly(name: str) -> None:
    text = "It's 12 o'clock; the HTTPServer answers:\n  {'a': [1, 2]}\n你好\uff0c世界。   \n" * 5_000
    assert len(text) > 4 * PIECE_CHARS_MAX
    assert count_text(encoding(name), text) == len(encoding(name).encode_ordinary(text))
