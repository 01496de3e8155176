"""Providers that are asked to go on with another's text: what they are told of it, and what they say.

They keep to the protocol of their style (`providers.continuation`), and some do not. Must not: use the core's code for
that protocol, or judge what becomes of it.
"""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

from providers.seam import Style
from tests.support.simulation.loop import Violation
from tests.support.simulation.provider import (
    BROKEN,
    FIRST_WORDS,
    KINDS,
    Piece,
    Script,
    Wanted,
    plain_pieces,
    script,
    some_words,
)

_ANCHOR = re.compile(r"<last_words>(.*?)</last_words>", re.DOTALL)
_TEXT = (0, False)
UNFAITHFUL = 0.15
ECHO_CHARS = 24
"""A text of fewer characters is not repeated by itself: it could be one that goes on so."""


class Asked:
    """A request to continue. `text`: what has been said already; `limit`: its `max_tokens`."""

    def __init__(self, request: bytes, messages: int, style: Style) -> None:
        """`messages`: how many the client's own request has. Raises Violation for one that is not as the style wants
        it."""
        body: dict[str, Any] = json.loads(request.partition(b"\r\n\r\n")[2])
        added = body["messages"][messages:]
        self.style = style
        self.limit: int | None = body.get("max_tokens")
        self.anchor = ""
        roles = ["assistant", "user"] if style == "instruction" else ["assistant"]
        if [each["role"] for each in added] != roles:
            raise Violation(f"a continuation by {style} was asked with {added}")
        self.text: str = added[0]["content"]
        if style == "instruction":
            found = _ANCHOR.search(added[1]["content"])
            self.anchor = found[1] if found else ""
            if not self.anchor or not self.text.endswith(self.anchor):
                raise Violation(f"not the last words of {self.text!r}: {self.anchor!r}")
        if (style == "prefix") != ("prefix" in added[0]) or (style == "continue_final") != (
            "continue_final_message" in body
        ):
            raise Violation(f"a continuation by {style} was asked with {body}")


def going_on(rng: Random, asked: Asked, wanted: Wanted, number: int, trouble: float) -> Script:
    """A connection of attempt `number`, with probability `trouble` one that goes wrong: also so that it does not go on
    where the text stopped."""
    new = some_words(rng)
    if new:
        new[0] = FIRST_WORDS[number] + new[0]
    pieces = plain_pieces(new)
    if asked.style == "instruction":
        if new and rng.random() < min(trouble, UNFAITHFUL):
            made = script(rng, wanted, trouble / 4, [(_TEXT, words, "") for words in new])
            made.completes = False
            made.kind = "unfaithful" if made.kind == "good" else made.kind
            for mark in made.marks:
                mark.shows = False
            return made
        pieces = _repeated(rng, asked.anchor, pieces)
        if rng.random() < 0.1:
            pieces.insert(0, ((0, True), "".join(some_words(rng)) or " red", ""))
    elif len(asked.text) > ECHO_CHARS and rng.random() < 0.3:
        # Some begin with all they were given, whatever they were asked.
        pieces = _repeated(rng, asked.text, pieces) if asked.style == "prefix" else pieces
    return script(rng, wanted, trouble, pieces, BROKEN if new and rng.random() < 3 * trouble else KINDS)


def _repeated(rng: Random, words: str, pieces: list[Piece]) -> list[Piece]:
    """The repetition first, in frames of its own or in one with the first new words."""
    at = rng.randrange(len(words))
    parts = [words] if rng.random() < 0.5 or not at else [words[:at], words[at:]]
    if pieces and rng.random() < 0.5:
        kind, said, told = pieces[0]
        pieces = [(kind, parts.pop() + said, told), *pieces[1:]]
    return [(_TEXT, part, "") for part in parts] + pieces
