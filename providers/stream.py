"""What codecs have in common, whatever their frames say: plain headers upwards; downwards a stream that ends once.

Must not: know a wire, or cost an ordinary chunk a call: a codec's `feed` is here whole, and not a shell around another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from providers.events import Completed, Event, Failed, ProviderFailure
from providers.failures import garbage
from providers.sse import FrameTooLarge, SseSplitter

JSON_BODY = (b"content-type", b"application/json")
PLAIN_HEADERS = (JSON_BODY, (b"accept-encoding", b"identity"), (b"user-agent", b"tollgate"))
STREAM_HEADERS = (*PLAIN_HEADERS, (b"accept", b"text/event-stream"))
WHOLE_HEADERS = (*PLAIN_HEADERS, (b"accept", b"application/json"))


class Stream(ABC):
    """One attempt's stream: `Failed` or `Completed` is its last event."""

    _over = False

    @property
    @abstractmethod
    def open_choices(self) -> tuple[int, ...]:
        """Choices that began and have not finished."""

    def _complete(self, events: list[Event]) -> None:
        self._over = True
        events.append(Completed(self.open_choices))

    def _fail(self, events: list[Event], failure: ProviderFailure) -> None:
        self._over = True
        events.append(Failed(failure))


class SseStream(Stream):
    """A stream of server-sent events. The codec sets `_splitter`."""

    _splitter: SseSplitter
    _ended = False
    """Whether the body has ended: what cannot be read then was cut off."""

    @abstractmethod
    def _frame(self, name: bytes, payload: bytes, events: list[Event]) -> None:
        """One frame's events."""

    @abstractmethod
    def _end(self, events: list[Event]) -> None:
        """The body ended, and nothing in it had ended the stream."""

    def feed(self, data: bytes) -> list[Event]:
        """Events completed by `data`; after `Failed` or `Completed` there are no more."""
        events: list[Event] = []
        if self._over:
            return events
        try:
            frames = self._splitter.feed(data)
        except FrameTooLarge:
            self._fail(events, garbage("The provider sent a frame above the size limit."))
            return events
        for name, payload in frames:
            if self._over:
                break
            self._frame(name, payload, events)
        return events

    def end_of_stream(self) -> list[Event]:
        """The body ended by itself: the events of a frame left without its blank line, and the stream's end."""
        events: list[Event] = []
        if self._over:
            return events
        self._ended = True
        try:
            for name, payload in self._splitter.end():
                self._frame(name, payload, events)
        except FrameTooLarge:
            self._fail(events, garbage("The provider sent a frame above the size limit."))
        if not self._over:
            self._end(events)
        return events
