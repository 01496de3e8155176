"""Texts to cut and put together again: what hypothesis makes of the places where seams go wrong."""

from __future__ import annotations

from hypothesis import strategies as st

from providers.seam import ECHO_CHARS_MIN, Seam, Style

STORY = "Once upon a time there was a fox. It lived in the old wood behind the mill, and nobody had"

WORDS = st.sampled_from(
    [
        *(
            "the ",
            "cat",
            " sat",
            "on",
            "é",
            "e\u0301",
            "e",
            "\u0301",
            "x",
            '"',
            "'s",
            "`",
            "\u201c",
            "\u2019",
            "\u00ab",
        ),
        *("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd", "\u200b", "\ufe0f"),
        *(
            " ",
            "  ",
            "\n",
            "\r\n",
            "\r",
            "\n\n",
            "\t",
            "\u00a0",
            "\u3000",
            "    ",
            "- ",
            "|",
            "日本語",
            "テキスト。",
            "42",
            ".",
        ),
    ]
)
TEXTS = st.one_of(st.lists(WORDS, max_size=60).map("".join), st.text(max_size=80))


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, str]:
    """A whole text and what of it was delivered."""
    whole = draw(TEXTS)
    return whole, whole[: draw(st.integers(0, len(whole)))]


def pieces(draw: st.DrawFn, text: str) -> list[str]:
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def through(delivered: str, style: Style, parts: list[str]) -> str:
    seam = Seam(delivered, style)
    return "".join([seam.feed(part) for part in parts]) + seam.end()


def means_echo(stem: str, reply: str) -> bool:
    """Whether a reply that only goes on looks as if it repeated the text's end."""
    reply = reply.lstrip()
    return any(reply.startswith(stem[at:]) for at in range(max(0, len(stem) - ECHO_CHARS_MIN + 1)))
