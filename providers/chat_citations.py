"""What an answer is taken from, as members of its chunks or of its message.

Must not: know a provider's citations: the codec tells which of them are of addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


class Citations:
    """The citations of one answer: those of addresses as OpenAI's `annotations`, others as they are, in `citations`.
    Each has an index of its own in its list, so that OpenAI's stream helpers put lists together that come in pieces."""

    __slots__ = ("_annotations", "_citations", "_url_of")

    def __init__(self, url_of: Callable[[Mapping[str, Any]], str | None]) -> None:
        """`url_of`: the address that a citation is of, or None."""
        self._url_of = url_of
        self._annotations = 0
        self._citations = 0

    def members(self, citations: Iterable[Any], start: int, end: int) -> dict[str, list[Any]]:
        """What the text from `start` to `end` is taken from. What is no object is passed over; empty lists are left
        out."""
        annotations: list[Any] = []
        others: list[Any] = []
        for citation in citations:
            if not isinstance(citation, dict):
                continue
            url = self._url_of(citation)
            if url is not None:
                place = {"start_index": start, "end_index": end, "url": url, "title": citation.get("title") or ""}
                at = self._annotations + len(annotations)
                annotations.append({"index": at, "type": "url_citation", "url_citation": place})
            else:
                at = self._citations + len(others)
                others.append({**citation, "index": at, "start_index": start, "end_index": end})
        self._annotations += len(annotations)
        self._citations += len(others)
        found = {"annotations": annotations, "citations": others}
        return {name: members for name, members in found.items() if members}
