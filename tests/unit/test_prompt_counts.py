"""Counts of texts that come again: equal to fresh ones, bounded, and known to one account only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from metering import prompt_counts
from metering.prompt_counts import PLAIN_CHARS_MAX, PromptCounts
from metering.ranks import encoding
from metering.token_counter import count_text

O200K, CL100K = encoding("o200k_base"), encoding("cl100k_base")
LONG = "All of this is said with every call. " * 20


class Counting:
    """An encoding that notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode_ordinary(self, text: str) -> list[int]:
        self.asked.append(text)
        return O200K.encode_ordinary(text)


@given(st.lists(st.text(max_size=2 * PLAIN_CHARS_MAX), max_size=8), st.booleans())
def test_a_count_is_the_fresh_count_each_time(texts: list[str], again: bool) -> None:
    counts = PromptCounts()
    for text in texts * (1 + again):
        assert counts.count("a", O200K, text) == count_text(O200K, text)
        assert counts.count("a", CL100K, text) == count_text(CL100K, text)


def test_a_text_is_counted_once_for_each_account() -> None:
    assert len(LONG) > PLAIN_CHARS_MAX
    seen, counts = Counting(), PromptCounts()
    for text in ("Be brief.", LONG):
        for account in ("a", "b", "a", "b"):
            assert counts.count(account, seen, text) == count_text(O200K, text)
    assert seen.asked == ["Be brief."] * 2 + [LONG] * 2


def test_a_lone_surrogate_is_counted() -> None:
    text = "\ud800" * (PLAIN_CHARS_MAX + 1)
    counts = PromptCounts()
    assert counts.count("a", O200K, text) == counts.count("a", O200K, text) == count_text(O200K, text)


def test_what_is_used_stays_and_the_rest_goes() -> None:
    seen, counts = Counting(), PromptCounts()
    for number in range(5 * prompt_counts.TEXTS_MAX):
        counts.count("a", seen, "kept")
        counts.count("a", seen, f"text {number}")
        assert len(counts) <= 2 * prompt_counts.TEXTS_MAX
    assert seen.asked.count("kept") == 1
    counts.count("a", seen, "text 0")
    assert seen.asked.count("text 0") == 2


def test_no_long_text_is_kept() -> None:
    counts = PromptCounts()
    counts.count("a", O200K, LONG)
    assert LONG not in [key[2] for key in counts]
