"""Streams that another candidate may continue: what was delivered is kept beside the codec, and given to the next one.

Must not: cost a stream anything on routes that do not continue, or decide whether one is continued.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from config.price import CompiledPrice, Rates
from metering.pricing import TokenUsage, rates_for, sane
from providers.codec import Answer, ChatCall, Codec, UpstreamRequest
from providers.continuation import Delivered, continuable, continued_body, style_for
from providers.continued import ContinuedCodec, Identity
from providers.events import Channel, Chunk, Delta, Event, ProviderFailure, ReportedUsage, UsageSeen
from providers.json_root import RootObject
from providers.seam import Seam, Style

if TYPE_CHECKING:
    from proxy.candidates import Candidate
    from proxy.live_session import Attempt


def continued_price(price: CompiledPrice, prompt_tokens: int) -> CompiledPrice:
    """What a client pays for the text of a continuation: the rates of its own prompt, which it has paid for with the
    request already."""
    rates = rates_for(price, prompt_tokens)
    return CompiledPrice(**{name: getattr(rates, name) for name in Rates.__struct_fields__})


class Keeper:
    """A codec that notes what of its stream the client has."""

    def __init__(self, inner: Codec, delivered: Delivered | None = None) -> None:
        """`delivered`: what the client has already, where the inner codec continues."""
        self._inner = inner
        self.delivered = delivered or Delivered()

    def feed(self, data: bytes) -> list[Event]:
        """The inner codec's events, noted."""
        return self._noted(self._inner.feed(data))

    def end_of_stream(self) -> list[Event]:
        """The same."""
        return self._noted(self._inner.end_of_stream())

    def _noted(self, events: list[Event]) -> list[Event]:
        for event in events:
            if isinstance(event, Chunk):
                self.delivered.add(event)
        return events

    def request(self, call: ChatCall, request_id: str) -> UpstreamRequest:
        """The inner codec's."""
        return self._inner.request(call, request_id)

    def failure(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> ProviderFailure:
        """The inner codec's."""
        return self._inner.failure(status, headers, body)

    def answer(self, body: bytes) -> Answer | ProviderFailure:
        """The inner codec's."""
        return self._inner.answer(body)

    def finish_chunk(self, choice: int, reason: str) -> bytes:
        """The inner codec's."""
        return self._inner.finish_chunk(choice, reason)

    def usage_chunk(self, usage: bytes, extra: bytes) -> bytes:
        """The inner codec's."""
        return self._inner.usage_chunk(usage, extra)

    @property
    def open_choices(self) -> tuple[int, ...]:
        """The inner codec's."""
        return self._inner.open_choices


class ResumedKeeper(Keeper):
    """The keeper of a continuation. What its provider reports is noted on the attempt and goes no further: it counts
    the prompt and the text a second time, and the words that were asked for again."""

    def __init__(self, inner: Codec, delivered: Delivered, attempt: Attempt) -> None:
        super().__init__(inner, delivered)
        self._attempt = attempt

    def _noted(self, events: list[Event]) -> list[Event]:
        for event in events:
            if isinstance(event, UsageSeen):
                self._attempt.reported = _believed(event.usage) or self._attempt.reported
        return super()._noted([event for event in events if not isinstance(event, UsageSeen)])


def _believed(usage: ReportedUsage) -> TokenUsage | None:
    if usage.prompt is None or usage.output is None:
        return None
    tokens = TokenUsage(**{name: getattr(usage, name) for name in TokenUsage.__struct_fields__})
    return None if sane(tokens) else tokens


class Resumed(msgspec.Struct, frozen=True):
    """What is to be continued: the client's request, its first chunk with text, all text, and the stream's form."""

    root: RootObject
    first: bytes
    text: str
    identity: Identity

    @classmethod
    def of(cls, codec: Codec, root: RootObject) -> Resumed | None:
        """What a broken stream's codec noted; None where it cannot be continued."""
        if not isinstance(codec, Keeper) or not continuable(root, codec.delivered) or codec.delivered.first is None:
            return None
        first = codec.delivered.first
        return cls(root, first, codec.delivered.text, Identity.of(first))

    def body(self, body: bytes, candidate: Candidate, spent_tokens: int) -> bytes:
        """The request to a candidate that continues. `spent_tokens` of its output limit are used up."""
        return continued_body(RootObject(body), self.text, self._style(candidate), spent_tokens)

    def continued(self, codec: Codec, candidate: Candidate, attempt: Attempt) -> Keeper:
        """The candidate's codec, its stream fitted to what was delivered. It notes further text for itself: none of it
        is delivered if the attempt fails before it has shown content."""
        seam = Seam(self.text, self._style(candidate))
        return ResumedKeeper(ContinuedCodec(codec, seam, self.identity), self._so_far(), attempt)

    def _so_far(self) -> Delivered:
        delivered = Delivered()
        delivered.add(Chunk(self.first, [Delta(0, Channel.CONTENT, 0, self.text)]))
        return delivered

    def _style(self, candidate: Candidate) -> Style:
        return style_for(candidate.continuation, candidate.model, self.root)
