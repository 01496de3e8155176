"""The seam between a text that broke off and its continuation: no character twice, none lost."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from providers.seam import Seam, SeamBroken, Style, anchor_of
from tests.support.seams import STORY, TEXTS, cut_texts, means_echo, pieces, through

STYLES: tuple[Style, ...] = get_args(Style)
NATIVE: tuple[Style, ...] = ("prefill", "prefix", "continue_final")


@given(cut_texts(), st.sampled_from(NATIVE), st.data())
@example(("Hello \r\n\r\nworld", "Hello \r\n"), "prefill", None)
@example(("Hello \r\nworld", "Hello \r"), "continue_final", None)
def test_a_reply_that_goes_on_makes_one_text_with_what_was_delivered(
    cut: tuple[str, str], style: Style, data: st.DataObject | None
) -> None:
    whole, delivered = cut
    stem = delivered.rstrip()
    reply = whole[len(stem) :]
    assume(not means_echo(stem, reply) and not (style == "prefix" and stem and reply.lstrip().startswith(stem)))
    parts = list(reply) if data is None else data.draw(st.composite(pieces)(reply))
    assert delivered + through(delivered, style, parts) == whole


@given(cut_texts(), st.data())
@example(("ok then", "ok"), None)
@example(("0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0", "0, 0, 0, 0, 0, 0, 0"), None)
def test_a_provider_that_begins_with_its_prefix_repeats_nothing(
    cut: tuple[str, str], data: st.DataObject | None
) -> None:
    whole, delivered = cut
    parts = list(whole) if data is None else data.draw(st.composite(pieces)(whole))
    stem = delivered.rstrip()
    assume(stem == stem.lstrip())  # the gateway's prefix is the stem, with white space before it where it has some
    assert delivered + through(delivered, "prefix", parts) == whole


@given(cut_texts(), st.data())
@example(('"" and', '"'), None)
@example(
    ("a b a b a b a b a b a b a b a b a b a b a b a b a b a b", "a b a b a b a b a b a b a b a b a b a b a b"), None
)
def test_a_reply_that_begins_with_the_last_words_makes_one_text(
    cut: tuple[str, str], data: st.DataObject | None
) -> None:
    whole, delivered = cut
    stem = delivered.rstrip()
    reply = (anchor_of(stem) if stem else "") + whole[len(stem) :]
    parts = list(reply) if data is None else data.draw(st.composite(pieces)(reply))
    assert delivered + through(delivered, "instruction", parts) == whole


@given(TEXTS, st.sampled_from(STYLES), st.lists(TEXTS, max_size=6))
def test_no_reply_whatever_makes_a_seam_do_more_than_break(delivered: str, style: Style, parts: list[str]) -> None:
    try:
        through(delivered, style, parts)
    except SeamBroken:
        assert style == "instruction"


@pytest.mark.parametrize(
    ("tail", "reply", "added"),
    [
        (" ", " world", "world"),  # comes again
        (" ", "world", "world"),  # does not
        ("\n\n", "\n\nNext", "Next"),
        ("\n", "\n\nNext", "\nNext"),
        ("\r\n", "\nNext", "Next"),
        ("\n", "\r\n\r\nNext", "\r\nNext"),
        (" \n", "\nNext", "Next"),
        ("\n", " Next", "Next"),  # the blank between two words, whatever stood there
        ("\n    ", "\n    return", "return"),
        (" ", "\n\nNext", "\n\nNext"),
        ("\u00a0", " world", "world"),
    ],
)
@pytest.mark.parametrize("style", STYLES)
def test_white_space_at_the_seam_stands_once(style: Style, tail: str, reply: str, added: str) -> None:
    delivered = "Hello there" + tail
    start = anchor_of("Hello there") if style == "instruction" else ""
    assert through(delivered, style, list(start + reply)) == added


@pytest.mark.parametrize("repeated", [STORY, STORY[34:], STORY[-20:]])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("lead", ["", "\n"])
def test_a_repeated_end_of_the_text_is_dropped(style: Style, repeated: str, lead: str) -> None:
    assert through(STORY, style, list(lead + repeated + " ever seen it.")) == " ever seen it."


@pytest.mark.parametrize(
    "delivered", ["| - | - | - | - | - |", "0, 0, 0, 0, 0, 0, 0, 0,", "row row row row row row row", "=" * 40]
)
@pytest.mark.parametrize("style", ["prefill", "continue_final"])
def test_text_that_repeats_itself_goes_on_so(style: Style, delivered: str) -> None:
    assert through(delivered, style, [delivered[-18:], "!"]) == delivered[-18:] + "!"


@pytest.mark.parametrize(
    ("around", "rest"),
    [
        ("{}", " ever seen it."),
        ("\n {}", " ever seen it."),
        ('"{}"', " ever seen it."),
        ("\u201c{}\u201d", " ever seen it."),
        ("`{}`", " ever seen it."),
        ("<last_words>{}</last_words>", " ever seen it."),
        ("<last_words>\n{}\n</last_words>", " ever seen it."),
        ('"{}', ' ever "seen" it.'),
        ("{}", ""),
    ],
)
def test_the_last_words_may_be_quoted(around: str, rest: str) -> None:
    assert through(STORY, "instruction", list(around.format(anchor_of(STORY)) + rest)) == rest


def test_the_last_words_may_be_written_otherwise() -> None:
    delivered = "Say \u201cit\u2019s\r\n cafe\u0301\u201d\u00a0now"
    reply = 'Say "it\'s\n caf\u00e9" now or never'
    assert through(delivered, "instruction", list(reply)) == " or never"


@pytest.mark.parametrize(
    "reply",
    [
        "Sure! Here is the rest: and nobody had ever seen it, nor would anybody see it until the winter came. " * 3,
        "No.",
    ],
)
def test_a_reply_that_begins_otherwise_breaks_the_seam(reply: str) -> None:
    with pytest.raises(SeamBroken):
        through(STORY, "instruction", list(reply))


@pytest.mark.parametrize(
    "reply", ["", "  \n", anchor_of(STORY), anchor_of(STORY)[:9], '"' + anchor_of(STORY), STORY[:70]]
)
def test_a_reply_that_is_over_with_the_last_words_adds_nothing(reply: str) -> None:
    assert through(STORY, "instruction", list(reply)) == ""


def test_a_reply_that_begins_otherwise_is_not_read_to_its_end() -> None:
    seam = Seam(STORY, "instruction")
    assert seam.feed("Sure! " * 20) == ""
    with pytest.raises(SeamBroken):
        seam.feed("Sure! " * 20)


def test_last_words_that_look_like_white_space_are_copied_once() -> None:
    assert through("\u200b", "instruction", ["\u200b\u200b!"]) == "\u200b!"


@pytest.mark.parametrize("style", STYLES)
def test_the_longest_repetition_is_the_one_that_is_dropped(style: Style) -> None:
    line = "the cat sat on the mat"
    delivered = f"{line}, and again {line}"
    assert through(delivered, style, [delivered, ", once more"]) == ", once more"


@pytest.mark.parametrize("style", STYLES)
def test_little_is_held_back(style: Style) -> None:
    seam = Seam(STORY, style)
    start = anchor_of(STORY) if style == "instruction" else ""
    assert seam.feed(start + " ever") == " ever"
    assert seam.feed(" seen") == " seen"


def test_a_long_text_repeated_piece_by_piece_costs_no_more_than_its_length() -> None:
    text = "".join(f"Line {number} of a long text.\n" for number in range(20_000))
    seam = Seam(text, "prefix")
    assert {seam.feed(text[at : at + 20]) for at in range(0, len(text), 20)} == {""}
    assert seam.feed("And on.") == "And on."


def test_the_last_words_are_whole_and_clear() -> None:
    assert anchor_of(STORY) == "old wood behind the mill, and nobody had"
    assert anchor_of("Hi") == "Hi"
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    assert anchor_of("x" + family * 8) in family * 8
    assert anchor_of("x" + family * 8).startswith("\U0001f468")
    twice = f"{STORY}. And {STORY[20:]}"
    assert twice.count(anchor_of(twice)) == 1


def test_an_echo_of_a_short_text_that_begins_with_a_blank_is_taken_out() -> None:
    assert Seam(" red", "prefix").feed(" red north") == " north"
