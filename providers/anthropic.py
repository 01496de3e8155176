"""Anthropic's Messages API behind OpenAI's chat completions: each native delta becomes one chunk.

Must not: do I/O, gather text, count tokens or hold money. Thinking goes out as `reasoning_content` and, with the
signatures that its way back needs, as `thinking_blocks` (the form of LiteLLM; entries have an `index`, so that OpenAI's
own stream helpers put their pieces together). Events, blocks and deltas of unknown types are passed over, and so are
calls and results of the provider's own tools: the client could not answer them.
Source: platform.claude.com/docs/en/build-with-claude/streaming, .../api/errors.
"""

from __future__ import annotations

from typing import Any

import msgspec

from providers.anthropic_answer import answer_of
from providers.anthropic_errors import failure_from_error, failure_from_status
from providers.anthropic_request import messages_body
from providers.anthropic_wire import (
    USAGE,
    WireBlock,
    WireDelta,
    WireEvent,
    cited_url,
    decode_event,
    finish_reason,
    lenient_event,
    refusal_text,
    usage_of,
)
from providers.chat_chunks import UNKNOWN_ID, ChunkMaker, WholeAnswer
from providers.chat_citations import Citations
from providers.claude import THINKING_BLOCKS
from providers.codec import ChatCall, Upstream, UpstreamRequest
from providers.events import Event, ProviderFailure, UsageSeen
from providers.failures import UNREADABLE, decoded, garbage, truncated
from providers.sse import SseSplitter
from providers.stream import STREAM_HEADERS, WHOLE_HEADERS, SseStream

VERSION = b"2023-06-01"
OPEN_BLOCKS_MAX = 1_000
CITATIONS_MAX = 64
"""Citations of one text block that wait for its end, and with it for the place that they cite."""

_NAMELESS = frozenset((b"ping", b"keepalive", b"heartbeat"))


class _Block:
    """An open block. `place` is its index among the tool calls or thinking blocks, or where its text starts."""

    __slots__ = ("citations", "input", "kind", "place")

    def __init__(self, kind: str, place: int) -> None:
        self.kind = kind
        self.place = place
        self.input: str | None = None
        """A tool call's arguments as its start had them, as long as no piece of them came."""
        self.citations: list[Any] = []


class AnthropicCodec(SseStream):
    """One attempt's wire. See `providers.codec.Codec` for the methods' contract."""

    def __init__(self, upstream: Upstream, call: ChatCall) -> None:
        self._upstream = upstream
        self._call = call
        self._splitter = SseSplitter(call.frame_bytes_max)
        self._maker = ChunkMaker.of(call, UNKNOWN_ID)
        self._blocks: dict[int, _Block] = {}
        self._usage: dict[str, Any] = {}
        self._chars = 0
        self._tools = 0
        self._thoughts = 0
        self._sources = Citations(cited_url)
        self._begun = False
        self._finished = False

    def request(self, call: ChatCall, request_id: str) -> UpstreamRequest:
        """POST to `<base>/messages`. Options of the upstream: `version` and `beta` (headers of those names), `thinking`
        (see `anthropic_request`). Raises BadRequest, Unsupported."""
        upstream, options = self._upstream, self._upstream.options
        body, betas = messages_body(call.body, upstream.drop, options, upstream.refused)
        headers: tuple[tuple[bytes, bytes], ...] = STREAM_HEADERS if call.stream else WHOLE_HEADERS
        headers = (*headers, (b"anthropic-version", options.get("version", "").encode() or VERSION))
        if upstream.key is not None:
            bearer = upstream.key_style == "bearer"
            key = upstream.key.encode()
            headers = (*headers, (b"authorization", b"Bearer " + key) if bearer else (b"x-api-key", key))
        wanted = [beta for beta in (options.get("beta", ""), *betas) if beta]
        own = [(b"x-request-id", request_id.encode())]
        if wanted:
            own.append((b"anthropic-beta", ",".join(wanted).encode()))
        return UpstreamRequest(b"POST", upstream.target + b"/messages", headers, tuple(own), body)

    def _end(self, events: list[Event]) -> None:
        """Complete when a stop reason came, even without `message_stop`."""
        if self._finished:
            self._complete(events)
        else:
            self._fail(events, truncated())

    def _frame(self, name: bytes, payload: bytes, events: list[Event]) -> None:
        try:
            event = self._read(name, payload)
        except UNREADABLE:
            self._fail(events, garbage("The provider sent a frame that cannot be read as JSON."))
            return
        if event is None:
            self._fail(events, garbage("The provider sent an event of an unknown shape."))
            return
        kind = event.type
        if kind == "content_block_delta":
            if event.delta is not None:
                self._delta(event.index, event.delta, events)
        elif kind == "content_block_start":
            if event.content_block is not None:
                self._start(event.index, event.content_block, events)
        elif kind == "content_block_stop":
            self._stop(event.index, events)
        elif kind == "message_start":
            self._message(event, events)
        elif kind == "message_delta":
            self._message_delta(event, events)
        elif kind == "message_stop":
            self._message_stop(events)
        elif kind == "error" or name == b"error" or event.error is not None:
            self._fail(events, failure_from_error(event.error or decoded(payload)))

    def _read(self, name: bytes, payload: bytes) -> WireEvent | None:
        """Raises one of UNREADABLE."""
        if name in _NAMELESS:
            return WireEvent()
        if payload.strip() == b"[DONE]":  # servers that copy this wire copy OpenAI's end too
            return WireEvent(type="message_stop")
        try:
            return decode_event(payload)
        except msgspec.ValidationError:
            return lenient_event(payload)

    # -- the message -------------------------------------------------------------------------------------------------

    def _message(self, event: WireEvent, events: list[Event]) -> None:
        message = event.message
        if message is not None and not self._begun:
            self._maker = ChunkMaker.of(self._call, message.id or UNKNOWN_ID, message.model)
        if message is not None and message.usage is not None:
            self._note(message.usage)
        self._begin(events)
        usage = usage_of(self._usage, partial=True)
        if usage is not None:
            events.append(UsageSeen(usage))

    def _begin(self, events: list[Event]) -> None:
        if not self._begun:
            self._begun = True
            events.append(self._maker.role())

    def _message_delta(self, event: WireEvent, events: list[Event]) -> None:
        self._begin(events)
        delta = event.delta
        if delta is not None and delta.stop_reason is not None and not self._finished:
            self._finished = True
            refusal = refusal_text(delta.stop_details)
            if refusal:
                events.append(self._maker.refusal(refusal))
            events.append(self._maker.finish(finish_reason(delta.stop_reason)))
        if event.usage is not None:
            self._note(event.usage)
            usage = usage_of(self._usage)
            if usage is not None:
                events.append(UsageSeen(usage))

    def _note(self, usage: dict[str, Any]) -> None:
        """Reports are cumulative: what a later one names replaces what an earlier one said of it."""
        self._usage.update((name, usage[name]) for name in USAGE if usage.get(name) is not None)

    def _message_stop(self, events: list[Event]) -> None:
        if self._begun:
            self._complete(events)
        else:
            self._fail(events, truncated("The provider answered with an empty stream."))

    # -- its blocks --------------------------------------------------------------------------------------------------

    def _start(self, index: int, block: WireBlock, events: list[Event]) -> None:
        self._begin(events)
        if len(self._blocks) >= OPEN_BLOCKS_MAX:
            self._fail(events, garbage("The provider opened more blocks than any answer has."))
        elif block.type == "text":
            self._blocks[index] = _Block("text", self._chars)
            self._text(block.text, events)
        elif block.type == "thinking":
            self._blocks[index] = opened = _Block("thinking", self._thoughts)
            self._thoughts += 1
            self._thinking(opened.place, block.thinking, events)
            self._signature(opened.place, block.signature, events)
        elif block.type == "redacted_thinking":
            piece = {"index": self._thoughts, "type": "redacted_thinking", "data": block.data or ""}
            self._thoughts += 1
            events.append(self._maker.extra(delta_members={THINKING_BLOCKS: [piece]}))
        elif block.type == "tool_use":
            self._blocks[index] = opened = _Block("tool", self._tools)
            self._tools += 1
            opened.input = msgspec.json.encode(block.input or {}).decode()
            events.append(self._maker.tool_start(opened.place, block.id or f"toolu_{index}", block.name or ""))

    def _delta(self, index: int, delta: WireDelta, events: list[Event]) -> None:
        if not self._begun:
            self._begin(events)
        kind, block = delta.type, self._blocks.get(index)
        if kind == "text_delta":
            self._text(delta.text, events)
        elif kind == "thinking_delta":
            self._thinking(0 if block is None else block.place, delta.thinking, events)
        elif kind == "signature_delta":
            self._signature(0 if block is None else block.place, delta.signature, events)
        elif block is None:
            return
        elif kind == "input_json_delta" and block.kind == "tool":
            if delta.partial_json:
                block.input = None
                events.append(self._maker.tool_arguments(block.place, delta.partial_json))
        elif kind == "citations_delta" and block.kind == "text":
            block.citations.append(delta.citation)
            if len(block.citations) >= CITATIONS_MAX:
                self._cite(block, events)

    def _stop(self, index: int, events: list[Event]) -> None:
        block = self._blocks.pop(index, None)
        if block is None:
            return
        if block.kind == "tool" and block.input is not None:  # a call without arguments is one with an empty object
            events.append(self._maker.tool_arguments(block.place, block.input))
        if block.citations:
            self._cite(block, events)

    def _text(self, text: str | None, events: list[Event]) -> None:
        if text:
            self._chars += len(text)
            events.append(self._maker.content(text))

    def _thinking(self, place: int, text: str | None, events: list[Event]) -> None:
        if text:
            piece = {"index": place, "type": "thinking", "thinking": text}
            events.append(self._maker.reasoning(text, extra={THINKING_BLOCKS: [piece]}))

    def _signature(self, place: int, signature: str | None, events: list[Event]) -> None:
        if signature:
            piece = {"index": place, "type": "thinking", "thinking": "", "signature": signature}
            events.append(self._maker.extra(delta_members={THINKING_BLOCKS: [piece]}))

    def _cite(self, block: _Block, events: list[Event]) -> None:
        members = self._sources.members(block.citations, block.place, self._chars)
        block.citations = []
        if members:
            events.append(self._maker.extra(delta_members=members))

    # -- the rest of the contract ------------------------------------------------------------------------------------

    def failure(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> ProviderFailure:
        """What a status other than 2xx means."""
        return failure_from_status(status, headers, body)

    def answer(self, body: bytes) -> WholeAnswer | ProviderFailure:
        """Read a non-stream answer; an error object in a 200 is a failure."""
        return answer_of(body, self._call)

    def finish_chunk(self, choice: int, reason: str) -> bytes:
        """The payload that ends `choice` on the provider's behalf."""
        return self._maker.finish_payload(choice, reason)

    def usage_chunk(self, usage: bytes, extra: bytes) -> bytes:
        """The final usage payload, in the shape of the stream's own chunks."""
        return self._maker.usage_payload(usage, extra)

    @property
    def open_choices(self) -> tuple[int, ...]:
        """The one choice, while it is begun and not finished."""
        return (0,) if self._begun and not self._finished else ()
