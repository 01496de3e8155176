"""OpenAI's chat completions wire, as OpenAI and the many servers that copy it really send it.

Must not: do I/O, count tokens or hold money. Payloads pass byte for byte; only what breaks clients is rewritten
(a missing role or tool index, usage outside the last chunk, a model name when the route asks for it).
"""

from __future__ import annotations

import msgspec

from providers.codec import ChatCall, Upstream, UpstreamRequest
from providers.events import Channel, Chunk, Completed, Delta, Event, ProviderFailure, ReportedUsage, UsageSeen
from providers.failures import UNREADABLE, garbage, truncated
from providers.json_root import NotAnObject, RootObject
from providers.openai_errors import failure_from_frame, failure_from_status
from providers.openai_repair import finish_payload, repaired, usage_payload
from providers.openai_request import affordable, azure_target, without
from providers.openai_wire import (
    NO_USAGE,
    WireChoice,
    WireChunk,
    decode_any,
    decode_chunk,
    deltas_of,
    lenient_chunk,
    lenient_delta,
    only_text,
    unheard,
    usage_of,
)
from providers.sse import SseSplitter
from providers.stream import STREAM_HEADERS, WHOLE_HEADERS, SseStream

OURS = b'"x_tollgate"'
_LF = 0x0A
_IGNORED_EVENTS = frozenset((b"ping", b"keepalive", b"heartbeat"))


class OpenAICodec(SseStream):
    """One attempt's wire. See `providers.codec.Codec` for the methods' contract."""

    def __init__(self, upstream: Upstream, call: ChatCall) -> None:
        self._upstream = upstream
        self._call = call
        self._splitter = SseSplitter(call.frame_bytes_max)
        self._begun: set[int] = set()
        self._finished: set[int] = set()
        self._named: set[tuple[int, int]] = set()
        self._first: bytes | None = None

    def request(self, call: ChatCall, request_id: str) -> UpstreamRequest:
        """POST to `<base>/chat/completions` with our key and nothing of the client's headers. Raises Unsupported for
        what the candidate's price does not cover."""
        upstream = self._upstream
        headers: tuple[tuple[bytes, bytes], ...] = STREAM_HEADERS if call.stream else WHOLE_HEADERS
        if upstream.key is not None:
            key = upstream.key.encode()
            bearer = upstream.key_style == "bearer"
            headers = (*headers, (b"authorization", b"Bearer " + key) if bearer else (b"api-key", key))
        own = ((b"x-request-id", request_id.encode()),)
        target = upstream.target + b"/chat/completions" if upstream.kind != "azure" else azure_target(upstream, call)
        body = without(call.body, upstream.drop) if upstream.drop else call.body
        root = call.root
        if upstream.caseless or (
            upstream.refused and (root is None or not upstream.refused.isdisjoint(root.spans))
        ):  # here, so that a request without any of these costs no more than the question
            body = affordable(body, root, upstream)
        return UpstreamRequest(b"POST", target, headers, own, body)

    def _end(self, events: list[Event]) -> None:
        """Complete when every choice finished, or the profile ends so."""
        whole = self._finished == self._begun  # not the number asked for: some servers ignore `n`
        if self._begun and (whole or self._upstream.clean_eof):
            self._complete(events)
        else:
            self._fail(events, truncated())

    def _frame(self, name: bytes, payload: bytes, events: list[Event]) -> None:
        """One frame's events. What most of a stream is, a piece of one choice's text that passes as it is, is told
        here; everything else takes the long way, which gives such a frame the same event."""
        try:
            chunk = None if name else decode_chunk(payload)
        except UNREADABLE:
            chunk = None
        if chunk is not None:
            delta = only_text(chunk)
            if delta is not None and delta.choice in self._begun and self._as_it_is(payload):
                events.append(Chunk(payload, [delta], (), True))
                return
        self._any_frame(name, payload, chunk, events)

    def _as_it_is(self, payload: bytes) -> bool:
        return _LF not in payload and self._call.rename_to is None and payload.find(OURS) < 0

    def _any_frame(self, name: bytes, payload: bytes, chunk: WireChunk | None, events: list[Event]) -> None:
        """`chunk` is the payload where it is read already."""
        if payload == b"[DONE]" or payload.strip() == b"[DONE]":
            if self._begun:
                self._complete(events)
            else:
                self._fail(events, truncated("The provider answered with an empty stream."))
            return
        if name in _IGNORED_EVENTS:
            return
        try:
            self._json_frame(name, payload, chunk, events)
        except UNREADABLE:
            self._fail(events, garbage("The provider sent a frame that cannot be read as JSON."))

    def _json_frame(self, name: bytes, payload: bytes, chunk: WireChunk | None, events: list[Event]) -> None:
        """Raises one of UNREADABLE: members that are only skipped at first are checked when they are used."""
        if chunk is None:
            chunk = self._read(payload)
        if b"\n" in payload:
            # Sent as several data lines: in JSON such a line end is a space, in a frame of ours an end. Read again, so
            # that no member of it keeps one.
            payload = payload.replace(b"\n", b" ")
            chunk = self._read(payload)
        if name == b"error" or (chunk is not None and chunk.error is not None):
            self._fail(events, failure_from_frame(payload))
        elif chunk is None:
            self._fail(events, garbage("The provider sent a frame that is not a JSON object."))
        elif chunk.choices:
            self._chunk(payload, chunk, events)
        else:
            self._without_choices(payload, chunk, events)

    def _read(self, payload: bytes) -> WireChunk | None:
        try:
            return decode_chunk(payload)
        except msgspec.ValidationError:
            return lenient_chunk(payload)

    def _chunk(self, payload: bytes, chunk: WireChunk, events: list[Event]) -> None:
        choices = chunk.choices or []
        deltas: list[Delta] = []
        finished: list[int] = []
        repair = False
        for choice in choices:
            if choice.finish_reason == "error":
                self._fail(events, failure_from_frame(payload))
                return
            repair = self._choice(choice, deltas, finished) or repair
        if not deltas and not finished:
            deltas += unheard(payload)
        if self._first is None:
            self._first = payload
        raw = None if chunk.usage in NO_USAGE and chunk.x_groq is None else chunk.usage_json()
        if repair or raw is not None or self._call.rename_to is not None or OURS in payload:
            payload = repaired(payload, self._call.rename_to, choices=repair, null_usage=self._call.usage_wanted)
        events.append(Chunk(payload, deltas, tuple(finished), content=bool(deltas or finished)))
        if raw is not None:
            self._usage(raw, events)  # after its chunk: a report counts only for the text that came before it

    def _choice(self, choice: WireChoice, deltas: list[Delta], finished: list[int]) -> bool:
        """Collect one choice's text and end; returns whether the frame needs repair."""
        repair = False
        delta = choice.delta
        if delta is not None:
            found = deltas_of(choice.index, delta)
            if choice.index not in self._begun:
                repair = delta.role is None
            if delta.tool_calls or delta.function_call:
                found = self._once_named(found)
            if delta.tool_calls:
                repair = repair or any(call.index is None for call in delta.tool_calls)
            deltas += found
        self._begun.add(choice.index)
        if choice.finish_reason is not None and choice.index not in self._finished:
            self._finished.add(choice.index)
            finished.append(choice.index)
        return repair

    def _once_named(self, deltas: list[Delta]) -> list[Delta]:
        """Without repeated tool names: OpenAI sends a call's name once, others with each piece of its arguments."""
        kept = []
        for delta in deltas:
            if delta.channel is Channel.TOOL_NAME:
                if (delta.choice, delta.tool) in self._named:
                    continue
                self._named.add((delta.choice, delta.tool))
            kept.append(delta)
        return kept

    def _without_choices(self, payload: bytes, chunk: WireChunk, events: list[Event]) -> None:
        """The usage chunk, Azure's filter results, a foreign object: only who asked for usage expects such frames."""
        raw = chunk.usage_json()
        if raw is not None:
            self._usage(raw, events)
        elif chunk.choices is not None and self._call.usage_wanted:
            rename = self._call.rename_to
            if rename is not None or OURS in payload:
                payload = repaired(payload, rename, choices=False, null_usage=True)
            events.append(Chunk(payload))

    def _usage(self, raw: bytes | None, events: list[Event]) -> None:
        """Note a report."""
        usage = _reported(raw)
        if usage is not None:
            events.append(UsageSeen(usage))

    def _complete(self, events: list[Event]) -> None:
        self._over = True
        events.append(Completed(tuple(sorted(self._begun - self._finished))))  # `open_choices`, and a call less

    def failure(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> ProviderFailure:
        """What a status other than 2xx means."""
        return failure_from_status(status, headers, body)

    def answer(self, body: bytes) -> OpenAIAnswer | ProviderFailure:
        """Read a non-stream answer; an error object in a 200 is a failure."""
        try:
            return self._answer(body)
        except (NotAnObject, *UNREADABLE):
            return garbage("The provider's answer cannot be read as JSON.")

    def _answer(self, body: bytes) -> OpenAIAnswer | ProviderFailure:
        root = RootObject(body)
        error = root.raw("error")
        if error is not None and error != b"null":
            return failure_from_frame(body)
        choices = root.raw("choices") or b""
        if not choices.startswith(b"["):
            return garbage("The provider's answer has no choices.")
        usage = _reported(root.raw("usage"))
        if usage is None:
            decode_any(choices)  # its text will be counted, so it must be readable
        rename = self._call.rename_to
        if rename is not None:
            root = RootObject(root.replaced({"model": msgspec.json.encode(rename)}))
        return OpenAIAnswer(root, usage, choices)

    def finish_chunk(self, choice: int, reason: str) -> bytes:
        """The payload that ends `choice` on the provider's behalf."""
        return finish_payload(self._first, choice, reason, self._call)

    def usage_chunk(self, usage: bytes, extra: bytes) -> bytes:
        """The final usage payload, in the shape of the stream's own chunks."""
        return usage_payload(self._first, usage, extra, self._call)

    @property
    def open_choices(self) -> tuple[int, ...]:
        """Choices that began and have not finished."""
        return tuple(sorted(self._begun - self._finished))


class OpenAIAnswer(msgspec.Struct):
    """See `providers.codec.Answer`. `choices` is that member as sent: it is read only when its text is counted."""

    root: RootObject
    usage: ReportedUsage | None
    choices: bytes

    def texts(self) -> list[tuple[int, int, int, str]]:
        """(choice, channel, tool, text) of every text, as far as it can be read."""
        found: list[tuple[int, int, int, str]] = []
        try:
            choices = decode_any(self.choices)
        except UNREADABLE:  # beside a usage that was not believed
            return found
        for position, choice in enumerate(choices):
            message = choice.get("message") if isinstance(choice, dict) else None
            if isinstance(message, dict):
                deltas = deltas_of(position, lenient_delta(message))
                found += [(delta.choice, int(delta.channel), delta.tool, delta.text) for delta in deltas]
        return found


def _reported(raw: bytes | None) -> ReportedUsage | None:
    """The usage in a member. One that cannot be read is passed on as one that nobody will believe."""
    try:
        return None if raw is None else usage_of(raw)
    except UNREADABLE:
        return ReportedUsage(prompt=-1, output=-1)
