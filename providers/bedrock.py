"""Amazon Bedrock's Converse and ConverseStream: a binary event stream in, OpenAI's chunks out.

Must not: do I/O, count tokens or hold money. A stream is whole when `messageStop` and usage have come, or where the
body ends behind `messageStop`. Source: Amazon Bedrock API reference, ConverseStream and Converse; user guide, "API
keys".

Signed by a bearer key, or by SigV4 where the key is `ACCESS_KEY_ID:SECRET[:SESSION_TOKEN]`. The time of the signature
is `ChatCall.created`, so it must be the time of the attempt: AWS takes it for 5 minutes. `Upstream.options`: `region`;
`host`, the Host header that the transport will send (AWS's public endpoint of the region when absent); those of
`bedrock_request`.
"""

from __future__ import annotations

from typing import Any, ClassVar
from urllib.parse import quote

from providers.bedrock_answer import answer_of
from providers.bedrock_errors import (
    failure_from_error,
    failure_from_exception,
    failure_from_status,
)
from providers.bedrock_fields import family_of
from providers.bedrock_request import converse_body
from providers.bedrock_wire import (
    FAILED_STOPS,
    SERVER_TOOL,
    Piece,
    Reasoning,
    StreamEvent,
    ToolUse,
    cited_url,
    decode_event,
    finish_reason,
    redacted,
    usage_of,
)
from providers.chat_chunks import ChunkMaker, WholeAnswer
from providers.chat_citations import Citations
from providers.claude import THINKING_BLOCKS
from providers.codec import ChatCall, Upstream, UpstreamRequest
from providers.events import Event, ProviderFailure, UsageSeen
from providers.eventstream import DamagedStream, EventStreamSplitter, Message
from providers.failures import UNREADABLE, garbage, truncated, unfinished
from providers.sigv4 import Credentials, Unsigned, signing_headers
from providers.stream import JSON_BODY, PLAIN_HEADERS, WHOLE_HEADERS, Stream

BLOCKS_OPEN_MAX = 256
"""Blocks of a stream that have begun and not ended. Bedrock sends one after the other."""
CITATIONS_MAX = 100
"""A block's citations are told where it ends, or when there are so many."""
SERVICE = "bedrock"
_EVENT_STREAM = b"application/vnd.amazon.eventstream"
_STREAM_HEADERS = (*PLAIN_HEADERS, (b"accept", _EVENT_STREAM))
_NOT_THE_CLIENTS = -1


class _Block:
    """An open block: where its text starts, its index among the calls or the thoughts, and what is told at its end."""

    __slots__ = ("citations", "filled", "start", "thought", "tool")

    def __init__(self, start: int) -> None:
        self.start = start
        self.tool: int | None = None
        self.filled = False
        self.thought: int | None = None
        self.citations: list[dict[str, Any]] = []


class BedrockCodec(Stream):
    """One attempt's wire. See `providers.codec.Codec` for the methods' contract."""

    content_types: ClassVar[tuple[bytes, ...]] = (_EVENT_STREAM,)
    """What a stream's content type must be."""

    def __init__(self, upstream: Upstream, call: ChatCall) -> None:
        self._upstream = upstream
        self._call = call
        self._splitter = EventStreamSplitter(call.frame_bytes_max)
        self._answer_id = "chatcmpl-bedrock"
        self._maker = ChunkMaker.of(self._call, self._answer_id)
        self._signs = (upstream.options.get("family") or family_of(call.model)) == "anthropic"
        self._blocks: dict[int, _Block] = {}
        self._sources = Citations(cited_url)
        self._chars = 0
        self._tools = 0
        self._thoughts = 0
        self._begun = False
        self._stopped = False
        self._reported = False

    def request(self, call: ChatCall, request_id: str) -> UpstreamRequest:
        """POST to `<base>/model/<model>/converse-stream` or `/converse`. Raises BadRequest and Unsupported."""
        self._answer_id = f"chatcmpl-{request_id}"
        self._maker = ChunkMaker.of(self._call, self._answer_id)
        upstream = self._upstream
        verb = b"converse-stream" if call.stream else b"converse"
        target = b"%b/model/%b/%b" % (upstream.target, quote(call.model, safe="").encode(), verb)
        body = converse_body(call.body, call.model, upstream.drop, upstream.options, upstream.refused)
        own = ((b"x-request-id", request_id.encode()), *self._signed(target, body, call.created))
        return UpstreamRequest(b"POST", target, _STREAM_HEADERS if call.stream else WHOLE_HEADERS, own, body)

    def _signed(self, target: bytes, body: bytes, epoch_s: int) -> tuple[tuple[bytes, bytes], ...]:
        key, options = self._upstream.key, self._upstream.options
        if key is None:
            return ()
        credentials = Credentials.read(key)
        if credentials is None:
            return ((b"authorization", b"Bearer " + key.encode()),)
        region = options.get("region", "us-east-1")
        host = options.get("host") or f"bedrock-runtime.{region}.amazonaws.com"
        unsigned = Unsigned(b"POST", target, ((b"host", host.encode()), JSON_BODY), body)
        return signing_headers(unsigned, credentials, region=region, service=SERVICE, epoch_s=epoch_s)

    def feed(self, data: bytes) -> list[Event]:
        """Events completed by `data`; after `Failed` or `Completed` there are no more."""
        events: list[Event] = []
        if self._over:
            return events
        try:
            for message in self._splitter.feed(data):
                self._message(message, events)
                if self._over:
                    break
        except DamagedStream as damage:
            self._fail(events, garbage(f"The provider's event stream is damaged: {damage}."))
        return events

    def end_of_stream(self) -> list[Event]:
        """The body ended by itself. Complete when the message had stopped: then only its usage may be missing."""
        events: list[Event] = []
        if self._over:
            return events
        if self._stopped:
            self._complete(events)
        elif self._begun:
            self._fail(events, truncated())
        else:
            self._fail(events, truncated("The provider answered with an empty stream."))
        return events

    def _message(self, message: Message, events: list[Event]) -> None:
        kind = message.text(":message-type")
        if kind == "exception":
            self._fail(events, failure_from_exception(message.text(":exception-type"), message.payload))
        elif kind == "error":
            self._fail(events, failure_from_error(message.text(":error-code"), message.text(":error-message")))
        else:
            try:
                self._event(message.text(":event-type"), message.payload, events)
            except UNREADABLE:
                self._fail(events, garbage("The provider sent an event that cannot be read as JSON."))

    def _event(self, name: str, payload: bytes, events: list[Event]) -> None:
        """Events of other names are skipped: new ones must not end a stream."""
        if name == "contentBlockDelta":
            event = decode_event(payload)
            if event.delta is not None:
                self._delta(event.content_block_index, event.delta, events)
        elif name == "messageStart":
            self._begin(events)
        elif name == "contentBlockStart":
            event = decode_event(payload)
            if event.start is not None and event.start.tool_use is not None:
                self._tool_start(event.content_block_index, event.start.tool_use, events)
        elif name == "contentBlockStop":
            self._block_stop(decode_event(payload).content_block_index, events)
        elif name == "messageStop":
            self._stop(decode_event(payload).stop_reason or "", events)
        elif name == "metadata":
            self._metadata(decode_event(payload), events)

    def _begin(self, events: list[Event]) -> None:
        if not self._begun:
            self._begun = True
            events.append(self._maker.role())

    # -- its blocks --------------------------------------------------------------------------------------------------

    def _block(self, index: int, events: list[Event]) -> _Block:
        """The open block of this index. Only calls are announced; other blocks begin with their first delta."""
        self._begin(events)
        block = self._blocks.get(index)
        if block is None:
            self._blocks[index] = block = _Block(self._chars)
            if len(self._blocks) > BLOCKS_OPEN_MAX:
                self._fail(events, garbage("The provider opened more blocks than any answer has."))
        return block

    def _delta(self, index: int, delta: Piece, events: list[Event]) -> None:
        block = self._block(index, events)
        if self._over:
            return
        if delta.text:
            self._chars += len(delta.text)
            events.append(self._maker.content(delta.text))
        if delta.tool_use is not None:
            self._arguments(block, delta.tool_use.input, events)
        if delta.reasoning_content is not None:
            self._reasoning(block, delta.reasoning_content, events)
        if delta.citation is not None:
            block.citations.append(delta.citation)
            if len(block.citations) >= CITATIONS_MAX:
                self._cite(block, events)

    def _tool_start(self, index: int, use: ToolUse, events: list[Event]) -> None:
        block = self._block(index, events)
        if self._over:
            return
        if use.type == SERVER_TOOL:
            block.tool = _NOT_THE_CLIENTS
        else:
            block.tool = tool = self._tools
            self._tools += 1
            events.append(self._maker.tool_start(tool, use.tool_use_id or f"call_{tool}", use.name or ""))

    def _block_stop(self, index: int, events: list[Event]) -> None:
        block = self._blocks.pop(index, None)
        if block is None:
            return
        if block.tool is not None and block.tool != _NOT_THE_CLIENTS and not block.filled:
            events.append(self._maker.tool_arguments(block.tool, "{}"))  # a call without arguments
        if block.citations:
            self._cite(block, events)

    def _arguments(self, block: _Block, text: Any, events: list[Event]) -> None:
        if block.tool is None or not isinstance(text, str):
            self._fail(events, garbage("The provider sent a piece of a tool call that had not begun."))
        elif block.tool != _NOT_THE_CLIENTS and text:
            block.filled = True
            events.append(self._maker.tool_arguments(block.tool, text))

    def _reasoning(self, block: _Block, piece: Reasoning, events: list[Event]) -> None:
        """Anthropic's thinking is sent under both names: it must come back whole, with its signature."""
        if block.thought is None:
            block.thought = self._thoughts
            self._thoughts += 1
        place = {"index": block.thought, "type": "thinking"}
        if piece.text and self._signs:
            extra = {THINKING_BLOCKS: [{**place, "thinking": piece.text}]}
            events.append(self._maker.reasoning(piece.text, extra=extra))
        elif piece.text:
            events.append(self._maker.reasoning(piece.text))
        if piece.signature:
            signed = {**place, "thinking": "", "signature": piece.signature}
            events.append(self._maker.extra(delta_members={THINKING_BLOCKS: [signed]}))
        if piece.redacted_content:
            found = {"index": block.thought, **redacted(piece.redacted_content)}
            events.append(self._maker.extra(delta_members={THINKING_BLOCKS: [found]}))

    def _cite(self, block: _Block, events: list[Event]) -> None:
        members = self._sources.members(block.citations, block.start, self._chars)
        block.citations = []
        events.append(self._maker.extra(delta_members=members))

    # -- its end -----------------------------------------------------------------------------------------------------

    def _stop(self, reason: str, events: list[Event]) -> None:
        self._begin(events)
        if self._stopped:
            return
        if reason in FAILED_STOPS:
            self._fail(events, unfinished(reason))
            return
        self._stopped = True
        events.append(self._maker.finish(finish_reason(reason, called=self._tools > 0)))
        if self._reported:
            self._complete(events)

    def _metadata(self, event: StreamEvent, events: list[Event]) -> None:
        """It may come twice, once without usage."""
        usage = usage_of(event.usage)
        if usage is None:
            return
        events.append(UsageSeen(usage))
        self._reported = True
        if self._stopped:
            self._complete(events)

    def failure(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> ProviderFailure:
        """What a status other than 2xx means."""
        return failure_from_status(status, headers, body)

    def answer(self, body: bytes) -> WholeAnswer | ProviderFailure:
        """Read Converse's answer, and make OpenAI's of it."""
        return answer_of(body, self._answer_id, self._call)

    def finish_chunk(self, choice: int, reason: str) -> bytes:
        """The payload that ends `choice` on the provider's behalf."""
        return self._maker.finish_payload(choice, reason)

    def usage_chunk(self, usage: bytes, extra: bytes) -> bytes:
        """The final usage payload, in the shape of the stream's own chunks."""
        return self._maker.usage_payload(usage, extra)

    @property
    def open_choices(self) -> tuple[int, ...]:
        """Choices that began and have not finished."""
        return (0,) if self._begun and not self._stopped else ()
