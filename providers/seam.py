"""Where one text passes from a provider that broke off to the one that goes on: no character twice, none lost.

Must not: know a wire, or keep more of a reply than it must. What is held back is decided within a few words, unless the
reply goes on repeating what was delivered.

A reply may repeat the delivered text's last words (asked for, by "instruction"), its white space (which a prefill has
to leave out), or all of it (Mistral begins with the prefix that it was given).
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

Style = Literal["prefill", "prefix", "continue_final", "instruction"]
"""How a provider is asked to go on, see `providers.continuation`."""

ANCHOR_CHARS = 40
"""The most of the last words that a reply is asked to begin with; more where these stand in the text before, too."""
ANCHOR_CHARS_UNCLEAR = 160
ANCHOR_CHARS_MIN = 12
BLANK_CHARS_MAX = 256
"""White space that is held back, and that a text to be continued may end in."""
ECHO_CHARS_MIN = 16
"""A reply that begins with less of the text's end than this may mean it so."""
ECHO_CHARS_MAX = 2_000
"""How far back a repetition may begin, unless it is the whole text."""

TAG = "last_words"
_BLANK = "[\\s\u200b\u2060\ufeff]"
_ALIKE = {each: f"[{re.escape(group)}]" for group in ("'\u2018\u2019\u02bc", '"\u201c\u201d\u201e') for each in group}
_CLOSERS = {
    '"': '"',
    "'": "'",
    "`": "`",
    "\u201c": "\u201d",
    "\u2018": "\u2019",
    "\u00ab": "\u00bb",
    "\u201e": "\u201c",
}
_UNITS = re.compile(r"\r\n|.", re.DOTALL)
_LINE_ENDS = frozenset(("\r\n", "\n", "\r"))
_PERIODS_TRIED = 16


class SeamBroken(Exception):
    """The reply does not go on where the delivered text stopped."""


class Seam:
    """One reply's. `feed` its text; `end` when it is over. `delivered` is what the client has, `style` how the provider
    was asked."""

    __slots__ = ("_blank", "_opening", "_passing", "style")

    def __init__(self, delivered: str, style: Style) -> None:
        stem = delivered.rstrip()
        self.style = style
        self._blank = _Blank(delivered[len(stem) :])
        self._passing = False
        self._opening: _Anchored | _Echo | None = None
        if stem:
            self._opening = _Anchored(stem) if style == "instruction" else _Echo(stem, whole=style == "prefix")

    def feed(self, text: str) -> str:
        """What of the reply's text can be delivered now. Raises SeamBroken."""
        if self._passing:
            return text
        if self._opening is not None:
            after = self._opening.feed(text)
            if after is None:
                return ""
            self._opening, text = None, after
        return self._spaced(text)

    def end(self) -> str:
        """What was held back, as far as it is to be delivered. Raises SeamBroken."""
        if self._passing:
            return ""
        text = ""
        if self._opening is not None:
            opening, self._opening = self._opening, None
            text = self._spaced(opening.end())
        if not self._passing:
            self._passing = True
            text += self._blank.end()
        return text

    def _spaced(self, text: str) -> str:
        more = self._blank.feed(text)
        self._passing = more is not None
        return more or ""


def anchor_of(stem: str) -> str:
    """The last words of a text that does not end in white space: what a reply is asked to begin with."""
    anchor = _last_words(stem, ANCHOR_CHARS)
    if stem.find(anchor) < len(stem) - len(anchor):
        return _last_words(stem, ANCHOR_CHARS_UNCLEAR)
    return anchor


def _last_words(stem: str, chars: int) -> str:
    if len(stem) <= chars:
        return stem.lstrip()
    end = stem[-chars:]
    words = end if stem[-chars - 1].isspace() else "".join(re.split(r"(\s)", end, maxsplit=1)[2:])
    words = words.lstrip()
    return words if len(words) >= ANCHOR_CHARS_MIN else _whole_characters(end.lstrip()).lstrip()


def _whole_characters(text: str) -> str:
    """Without the rest of a character whose beginning was cut off."""
    at = 0
    while at < len(text) - 1 and (
        unicodedata.category(text[at]) in ("Mn", "Mc", "Me", "Cf", "Sk") or text[at - 1 : at] == "\u200d"
    ):
        at += 1
    return text[at:]


class _Blank:
    """White space at the beginning of a reply's new text, where the delivered text ends in `tail`: what is in both is
    delivered once."""

    __slots__ = ("_held", "_tail")

    def __init__(self, tail: str) -> None:
        self._tail = tail
        self._held = ""

    def feed(self, text: str) -> str | None:
        self._held = held = self._held + text
        if held.startswith(self._tail):
            return held[len(self._tail) :]
        if len(held) <= BLANK_CHARS_MAX and (self._tail.startswith(held) or held.isspace()):
            return None
        return self.end()

    def end(self) -> str:
        held = self._held
        text = held.lstrip()
        return _not_yet(self._tail, held[: len(held) - len(text)]) + text


def _not_yet(tail: str, blank: str) -> str:
    """What of `blank` the delivered `tail` does not stand for already. A line end is one however it is written; a
    single blank is what stands between any two words."""
    if blank == " " and tail:
        return ""
    new = _UNITS.findall(blank)
    at = 0
    for unit in _UNITS.findall(tail):
        if at == len(new):
            break
        if (unit in _LINE_ENDS) == (new[at] in _LINE_ENDS):
            at += 1
        elif unit in _LINE_ENDS:
            break
    return "".join(new[at:])


class _Echo:
    """A reply that may begin by repeating the end of `stem`. `whole`: the provider does so with all of it, however
    little it is; `asked`: a repetition was asked for, so that one which text of this kind might go on with counts too.

    `feed` returns None while both may be true; then what stands behind the repetition, or everything.
    """

    __slots__ = ("_alive", "_asked", "_begin", "_complete", "_lead", "_parts", "_stem", "_whole", "found", "size")

    def __init__(self, stem: str, *, whole: bool = False, asked: bool = False) -> None:
        self._stem = stem
        self._begin = len(stem) - len(stem.lstrip())
        """Where all of it begins: white space before a reply is not looked at."""
        self._whole = whole
        self._asked = asked
        self._lead = ""
        self._parts: list[str] = []
        self._alive: list[int] | None = None
        """Where in `stem` everything so far stands; None before there is more than white space."""
        self._complete: list[int] = []
        self.size = 0
        """Characters so far, without white space before them."""
        self.found = False

    @property
    def possible(self) -> bool:
        """Whether everything so far is a repetition that is not at its end."""
        return bool(self._alive)

    def feed(self, text: str) -> str | None:
        if self._alive is None:
            self._lead += text
            text = self._lead.lstrip()
            if not text:
                return self._lead if len(self._lead) > BLANK_CHARS_MAX else None
            self._lead = self._lead[: len(self._lead) - len(text)]
            self._alive = self._starts(text[0])
        self._parts.append(text)
        self._narrow(self._alive, text)
        return None if self._alive else self.end()

    def end(self) -> str:
        """Also for a reply that ended in the middle of a repetition: then it meant it so."""
        text = "".join(self._parts)
        for start in sorted(self._complete):
            if self._counts(start):
                self.found = True
                return text[len(self._stem) - start :]
        return self._lead + text

    def _starts(self, first: str) -> list[int]:
        stem, size = self._stem, len(self._stem)
        near = range(max(0, size - ECHO_CHARS_MAX), size - ECHO_CHARS_MIN + 1)
        starts = [at for at in near if stem[at] == first]
        begin = self._begin
        if stem[begin] == first and begin not in starts and (self._whole or size >= ECHO_CHARS_MIN):
            starts.append(begin)
        return starts

    def _narrow(self, starts: list[int], text: str) -> None:
        stem, alive = self._stem, []
        for start in starts:
            at = start + self.size
            if len(stem) - at > len(text):
                if stem.startswith(text, at):
                    alive.append(start)
            elif text.startswith(stem[at:]):
                self._complete.append(start)
        self.size += len(text)
        self._alive = alive

    def _counts(self, start: int) -> bool:
        """Whether text does not go on so by itself, as a row of a table or of zeros does."""
        if self._asked or (self._whole and start == self._begin):
            return True
        repeated = self._stem[start:]
        return not self._stem.endswith(repeated + repeated) and not periodic(repeated)


def periodic(text: str) -> bool:
    """Whether `text` is one piece at least twice, the last time perhaps in part."""
    half = text[: (len(text) + 1) // 2]
    at = 0
    for _ in range(_PERIODS_TRIED):
        at = text.find(half, at + 1)
        if at < 0:
            return False
        if text.startswith(text[at:]):
            return True
    return True


class _Anchored:
    """A reply that was asked to begin with the last words. White space may differ, quotation marks or the request's tag
    may stand around them, and more of the text's end than these words is as good."""

    __slots__ = ("_anchor", "_bare", "_echo", "_held", "_most", "_quoted")

    def __init__(self, stem: str) -> None:
        self._anchor = anchor = anchor_of(stem)
        words = f"{_BLANK}+".join(map(_word, anchor.split()))
        self._bare = re.compile(f"{_BLANK}*{words}")
        self._quoted = re.compile(f"{_BLANK}*(<{TAG}>|[{''.join(_CLOSERS)}]){_BLANK}*{words}")
        self._echo = _Echo(stem, asked=True)
        self._held = ""
        self._most = 2 * len(anchor) + 64

    def feed(self, text: str) -> str | None:
        repeated = self._echo.feed(text)
        if len(self._held) <= self._most:
            self._held += text
            after = self._after()
            if after is not None:
                return after
        if self._echo.found:
            return repeated
        if len(self._held) > self._most and not (self._echo.possible and self._echo.size >= ECHO_CHARS_MIN):
            raise SeamBroken
        return None

    def end(self) -> str:
        """A reply that is over before the last words were: nothing is new in it."""
        if self._echo.possible or not self._held.strip():
            return ""
        quoted = self._quoted.match(self._held)
        if quoted is not None:
            after = self._held[quoted.end() :]
            return "" if _closer(quoted[1]).startswith(after.strip()) else after
        if " ".join(self._anchor.split()).startswith(" ".join(self._held.split())):
            return ""
        raise SeamBroken

    def _after(self) -> str | None:
        """What stands behind the words, once that is known."""
        held = self._held
        if held.startswith(self._anchor):
            return held[len(self._anchor) :]
        bare = self._bare.match(held)
        if bare is not None:
            return held[bare.end() :]
        quoted = self._quoted.match(held)
        if quoted is None:
            return None
        after, closer = held[quoted.end() :], _closer(quoted[1])
        inner = after.lstrip()
        if inner.startswith(closer):
            return inner[len(closer) :]
        return None if closer.startswith(inner) and len(after) <= BLANK_CHARS_MAX else after


def _closer(opener: str) -> str:
    return _CLOSERS.get(opener, f"</{TAG}>")


def _word(word: str) -> str:
    """A word as a pattern: in each normal form, with each form of its quotation marks."""
    forms = dict.fromkeys((word, unicodedata.normalize("NFC", word), unicodedata.normalize("NFD", word)))
    return f"(?:{'|'.join(''.join(_ALIKE.get(each, re.escape(each)) for each in form) for form in forms)})"
