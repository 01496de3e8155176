"""Exact token counts of text that arrives in pieces: which encoding a model uses, whole texts, and streams.

Sums of per-delta counts are wrong by up to 100 %, and tokenising the text again for each delta is quadratic. A
`StreamCounter` instead tokenises each character about once, in spans that end where a token must end.
Must not: load ranks (`metering.ranks` does), read a clock, or know what a token costs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

TAIL_CHARS_MAX = 16 * 1024
"""Longest text without a boundary that is kept whole. Beyond it the tail is counted as it stands and dropped: the
total may then differ from a whole-text count by a few tokens for every such cut, never by more (ordinary prose, code,
JSON and base64 have a boundary every few dozen characters; only runs like "aaaa" or "====" reach the bound)."""

SCAN_CHARS = 256
"""New characters that are collected before the text is searched for a boundary and tokenised."""

PIECE_CHARS_MAX = 64 * 1024
"""Most characters of one call to the tokeniser. It gives up on a million blanks in a row, and a run of megabytes takes
it seconds. Longer texts are cut at a boundary, which keeps their count exact, or inside a run that has none."""

JOINT_TOKENS = 8
"""`upper()` trusts the tail's last exact count and adds the bytes that came later plus this much, because appending can
undo merges at the joint. The largest such growth in 1.2 million appended characters, both encodings, was 4."""

_CL100K_PREFIXES = (
    "gpt-4-",
    "gpt-3.5",
    "gpt-35",
    "text-embedding-3",
    "text-embedding-ada-002",
)

# Positions where a token ends under every continuation, both patterns (neither looks behind):
#   R1  a blank or tab after a non-blank: it can only be the first character of a piece;
#   R2  anything but white space and "/" after a line break: runs of line breaks end a piece;
#   R3  an ASCII letter beside an ASCII digit;
#   R4  a letter before punctuation that no piece continues with ("'" may: it starts "'s"). The letters are ASCII and
#       the blocks whose every character has Unicode category Lo: kana, CJK ideographs, hangul syllables. R4 is what
#       keeps Chinese and Japanese, which have no blanks, from growing one long tail.
# Greedy ".*" makes the search start at the end of the text, so it costs a few steps and not one for each boundary.
_LETTER = "A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3"
_PUNCTUATION = r""",.;:!?()\[\]{}"<>=，。！？、；：（）「」"""  # noqa: RUF001
_LAST_BOUNDARY = re.compile(
    rf"(?s:.*)(?:(?<=\S)(?=[ \t])|(?<=[\r\n])(?=[^\s/])|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
    rf"|(?<=[{_LETTER}])(?=[{_PUNCTUATION}]))"
)


class Encoder(Protocol):
    """What a counter needs of tiktoken's Encoding (a test counts the calls through its own)."""

    def encode_ordinary(self, text: str) -> list[int]: ...


def encoding_name(model: str) -> str:
    """The encoding of a model by its name: `cl100k_base` for gpt-4, gpt-4-*, gpt-3.5 and the embedding models,
    `o200k_base` for everything newer and everything unknown. A path or fine-tune prefix is ignored."""
    name = model.rpartition("/")[2].lower().removeprefix("ft:")
    if name.partition(":")[0] == "gpt-4" or name.startswith(_CL100K_PREFIXES):
        return "cl100k_base"
    return "o200k_base"


def count_text(encoding: Encoder, text: str) -> int:
    """Tokens of a whole text. Special-token text counts as ordinary text, lone surrogates as U+FFFD."""
    return _tokens(encoding.encode_ordinary, text)


def _tokens(encode: Callable[[str], list[int]], text: str) -> int:
    at, tokens = 0, 0
    while len(text) - at > PIECE_CHARS_MAX:
        piece = text[at : at + PIECE_CHARS_MAX]
        found = _LAST_BOUNDARY.match(piece)
        cut = found.end() if found else 0
        tokens += len(encode(piece[:cut] if cut else piece))
        at += cut or len(piece)
    return tokens + (len(encode(text[at:])) if at < len(text) else 0)


def utf8_bytes(text: str) -> int:
    """Length in UTF-8, the hard upper bound of a text's tokens (a lone surrogate becomes U+FFFD: three bytes too)."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


class StreamCounter:
    """Tokens of a growing text. `feed` costs a list append, and one search and one tokenisation for `SCAN_CHARS`
    characters; memory is the tail: the text after the last boundary, at most `TAIL_CHARS_MAX` and one span."""

    __slots__ = (
        "_counted",
        "_counted_bytes",
        "_done",
        "_encode",
        "_fresh",
        "_fresh_chars",
        "_held",
        "_held_chars",
        "_last",
        "_since",
    )

    def __init__(self, encoding: Encoder) -> None:
        self._encode = encoding.encode_ordinary
        self._done = 0  # tokens up to the last boundary
        self._held: list[str] = []  # searched, no boundary inside
        self._held_chars = 0
        self._fresh: list[str] = []  # not searched yet
        self._fresh_chars = 0
        self._last = ""  # the character before the fresh text
        self._counted = 0  # tokens of the tail's first part, as the last `total()` found them
        self._counted_bytes = 0  # UTF-8 bytes of that part
        self._since = 0  # UTF-8 bytes of the tail after that part

    def feed(self, text: str) -> int:
        """Append `text`. Returns its length in UTF-8: the most by which `most()` grew."""
        self._fresh.append(text)
        self._fresh_chars += len(text)
        size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        self._since += size
        if self._fresh_chars >= SCAN_CHARS:
            self._advance()
        return size

    def copy(self) -> StreamCounter:
        """An independent counter of the same text."""
        twin = object.__new__(StreamCounter)
        twin._encode, twin._done, twin._last = self._encode, self._done, self._last
        twin._held, twin._held_chars = self._held.copy(), self._held_chars
        twin._fresh, twin._fresh_chars = self._fresh.copy(), self._fresh_chars
        twin._counted, twin._counted_bytes, twin._since = self._counted, self._counted_bytes, self._since
        return twin

    def total(self) -> int:
        """Tokens of all text so far, exact. Costs one tokenisation of the tail, which is usually one word."""
        if self._fresh_chars:
            self._advance()
        if self._since:
            self._counted = _tokens(self._encode, "".join(self._held))
            self._counted_bytes += self._since
            self._since = 0
        return self._done + self._counted

    def upper(self) -> int:
        """At least `total()`, without tokenising anything: finished tokens and the bytes of the tail."""
        return self.most() if self._since else self._done + self._counted

    def least(self) -> int:
        """What `total()` cannot fall below, whatever comes: tokens of text before the last boundary."""
        return self._done

    def most(self) -> int:
        """What `total()` can become, less a token for each byte of text to come: `upper()` and what the joint with
        that text may add, which is never more than the tail's bytes are."""
        joint = min(JOINT_TOKENS, self._counted_bytes - self._counted)
        return self._done + self._counted + joint + self._since

    def _advance(self) -> None:
        """Search the fresh text for its last boundary; tokenise what is before it, keep the rest."""
        block = "".join(self._fresh)
        self._fresh, self._fresh_chars = [], 0
        found = _LAST_BOUNDARY.match(self._last + block)
        cut = found.end() - len(self._last) if found else -1
        if cut >= 0 and (cut or self._last):
            self._held.append(block[:cut])
            block = block[cut:]
            size = utf8_bytes(block)
            self._finish(counted=cut == 0 and self._since == size)
            self._since = size
        self._held.append(block)
        self._held_chars += len(block)
        self._last = block[-1:] or self._last
        if self._held_chars > TAIL_CHARS_MAX:
            self._finish()
            self._last = ""

    def _finish(self, *, counted: bool = False) -> None:
        """No text to come changes the held text's tokens. `counted`: the last `total()` found just these."""
        self._done += self._counted if counted else _tokens(self._encode, "".join(self._held))
        self._held, self._held_chars = [], 0
        self._counted = self._counted_bytes = self._since = 0
