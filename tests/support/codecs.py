"""What the codecs' tests have in common: transcripts, streams fed in pieces, and what is in their events.

Must not: know a wire.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from providers.codec import Codec
from providers.events import Channel, Chunk, Completed, Event, Failed

TRANSCRIPTS = Path(__file__).parent.parent / "transcripts"


def transcripts(wire: str) -> dict[str, bytes]:
    """The streams of a wire in server-sent events, by their names."""
    return {path.stem: path.read_bytes() for path in sorted((TRANSCRIPTS / wire).glob("*.sse"))}


def bytewise(wire: bytes) -> list[bytes]:
    """A byte at a time."""
    return [wire[at : at + 1] for at in range(len(wire))]


def cut(wire: bytes, places: Iterable[int]) -> list[bytes]:
    """In pieces, cut at these places as far as it has them."""
    ends = sorted({min(place, len(wire)) for place in places} | {0, len(wire)})
    return [wire[start:end] for start, end in itertools.pairwise(ends)]


def fed(codec: Codec, pieces: Iterable[bytes]) -> list[Event]:
    """The events of a whole body."""
    return [event for piece in pieces for event in codec.feed(piece)] + codec.end_of_stream()


def ends_once(events: list[Event]) -> bool:
    """Whether the last event, and no other, is an end."""
    return [isinstance(event, Completed | Failed) for event in events] == [False] * (len(events) - 1) + [True]


def only(events: list[Event], kind: type[Any]) -> Any:
    """The one event of a kind."""
    found = [event for event in events if isinstance(event, kind)]
    assert len(found) == 1, events
    return found[0]


def chunks(events: list[Event]) -> list[Chunk]:
    """What is for the client."""
    return [event for event in events if isinstance(event, Chunk)]


def payloads(events: list[Event]) -> list[dict[str, Any]]:
    """The chunks' JSON."""
    return [json.loads(chunk.payload) for chunk in chunks(events)]


def choices(events: list[Event]) -> list[dict[str, Any]]:
    """The first choice in each chunk."""
    return [payload["choices"][0] for payload in payloads(events)]


def texts(events: list[Event], channel: Channel, choice: int | None = None) -> str:
    """All text of a channel, of one choice or of all."""
    deltas = [delta for chunk in chunks(events) for delta in chunk.deltas if delta.channel is channel]
    return "".join(delta.text for delta in deltas if choice in (None, delta.choice))
