"""Google's `generateContent` wire (Gemini API and Vertex AI), told as OpenAI's chat completions.

Must not: do I/O, count tokens or hold money. Streams are SSE with `data:` only: no event names, no `[DONE]`; the end is
a finishReason for every candidate and then the body's end. Source: ai.google.dev/api/generate-content.

What OpenAI has no place for goes where Google's own OpenAI-compatible endpoint puts it, into `extra_content.google`:
the `thought_signature` of a tool call or of a message (ai.google.dev/gemini-api/docs/thought-signatures), and, of our
own, `parts`: native parts of other kinds (executableCode, codeExecutionResult, ...), whole and in order. The code in
them is counted as output. `providers.gemini_contents` takes all of it back.
"""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import quote

from providers.chat_chunks import (
    UNKNOWN_ID,
    ChunkMaker,
    WholeAnswer,
    assistant_message,
    tool_call,
    whole_choices,
)
from providers.chat_request import read_chat
from providers.codec import ChatCall, Upstream, UpstreamRequest
from providers.events import Channel, Chunk, Delta, Event, ProviderFailure, UsageSeen
from providers.failures import UNREADABLE, garbage, truncated
from providers.gemini_errors import (
    blocked_prompt,
    error_in,
    error_of,
    failed_finish,
    failure_from_error,
    failure_from_status,
)
from providers.gemini_request import native_body
from providers.gemini_wire import (
    NO_REASON,
    Candidate,
    Frame,
    GeminiSplitter,
    Piece,
    UsageSoFar,
    citations,
    finish_reason,
    read_frame,
)
from providers.json_root import NotAnObject, RootObject
from providers.stream import STREAM_HEADERS, WHOLE_HEADERS, SseStream

CHOICES_MAX = 128
"""Candidates of one answer (OpenAI's own bound of `n`); an index beyond it is damage."""
_UNSPOKEN = {"thought", "signature"}
_FOLDERS = ("models/", "tunedModels/")


class _Choice:
    """What is known of one candidate of a stream."""

    __slots__ = ("calls", "finished", "images", "reason")

    def __init__(self) -> None:
        self.calls = 0
        self.images = 0
        self.reason: str | None = None
        self.finished = False


class GeminiCodec(SseStream):
    """One attempt's wire. See `providers.codec.Codec` for the methods' contract."""

    def __init__(self, upstream: Upstream, call: ChatCall) -> None:
        self._upstream = upstream
        self._call = call
        self._splitter = GeminiSplitter(call.frame_bytes_max)
        self._maker: ChunkMaker | None = None
        self._answer_id = UNKNOWN_ID
        self._choices: dict[int, _Choice] = {}
        self._usage = UsageSoFar()
        self._spoke = False
        self._thought = False

    def request(self, call: ChatCall, request_id: str) -> UpstreamRequest:
        """POST to `<base>/models/<model>:streamGenerateContent?alt=sse`, or `:generateContent`. A Vertex key is an
        OAuth access token. Raises `chat_request.Unsupported` and `chat_request.BadRequest`."""
        upstream = self._upstream
        chat = read_chat(call.body, native_tools=True, refused=upstream.refused, drop=upstream.drop)
        body = native_body(chat, call.model, vertex=upstream.kind == "vertex", drop=upstream.drop)
        headers: tuple[tuple[bytes, bytes], ...] = STREAM_HEADERS if call.stream else WHOLE_HEADERS
        if upstream.key is not None and upstream.kind == "vertex":
            headers = (*headers, (b"authorization", b"Bearer " + upstream.key.encode()))
        elif upstream.key is not None:
            headers = (*headers, (b"x-goog-api-key", upstream.key.encode()))
        own = ((b"x-request-id", request_id.encode()),)
        return UpstreamRequest(b"POST", upstream.target + _path(call), headers, own, body)

    def _end(self, events: list[Event]) -> None:
        """Complete when every candidate has a finish reason, or the profile ends so.

        The finish chunks wait until here because some models name a reason before their last piece.
        """
        if self._choices and (self._whole_so_far() or self._upstream.clean_eof):
            self._complete(events)
        else:
            self._fail(events, truncated())

    def _frame(self, name: bytes, payload: bytes, events: list[Event]) -> None:
        if not payload.strip() or payload == b"[DONE]":
            return
        try:
            frame, found = read_frame(payload)
        except UNREADABLE:
            error = error_in(payload)
            if error is not None:
                self._fail(events, failure_from_error(error))
            elif self._ended:
                self._fail(events, truncated())  # the body ended in it
            else:
                self._fail(events, garbage("The provider sent a frame that cannot be read."))
            return
        self._read(frame, found, events)

    def _read(self, frame: Frame, found: list[tuple[Candidate, list[Piece]]], events: list[Event]) -> None:
        error = error_of(frame.error)
        if error is not None:
            self._fail(events, failure_from_error(error))
            return
        if self._maker is None:
            self._answer_id = frame.response_id or UNKNOWN_ID
            self._maker = self._make(frame.model_version)
        failure = _blocked(frame)
        for candidate, parts in found:
            failure = self._candidate(self._maker, candidate, parts, events) or failure
        if frame.usage_metadata is not None:
            self._usage.update(frame.usage_metadata)
            usage = self._usage.reported(spoke=self._spoke, thought=self._thought, final=self._whole_so_far())
            if usage is not None:
                events.append(UsageSeen(usage))  # after its chunks: a report counts only for the text before it
        if failure is not None:
            self._fail(events, failure)

    def _candidate(
        self, maker: ChunkMaker, candidate: Candidate, parts: list[Piece], events: list[Event]
    ) -> ProviderFailure | None:
        """One candidate's chunks; returns the failure that it ended in, if it did."""
        index = candidate.index
        if not 0 <= index < CHOICES_MAX:
            return garbage("The provider sent a candidate with an impossible index.")
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = _Choice()
            events.append(maker.role(index))
        for piece in parts:
            self._piece(maker, index, choice, piece, events)
        notes = citations(candidate)
        if notes:
            events.append(maker.extra(delta_members={"annotations": notes}, choice=index))
        reason = candidate.finish_reason
        if reason is None or reason in NO_REASON:
            return None
        choice.reason = finish_reason(reason, called=choice.calls > 0)
        return failed_finish(reason) if choice.reason is None else None

    def _piece(self, maker: ChunkMaker, index: int, choice: _Choice, piece: Piece, events: list[Event]) -> None:
        if piece.kind == "text":
            self._spoke = True
            events.append(maker.content(piece.text, index))
        elif piece.kind == "thought":
            self._thought = True
            events.append(maker.reasoning(piece.text, index))
        elif piece.kind == "call" and piece.call is not None:
            self._spoke = True
            tool, choice.calls = choice.calls, choice.calls + 1
            call_id = _call_id(piece, self._answer_id, index, tool)
            events.append(maker.tool_start(tool, call_id, piece.call.name, _signed(piece.text), index))
            events.append(maker.tool_arguments(tool, piece.arguments, index))
        elif piece.kind == "signature":
            events.append(maker.extra(delta_members=_signed(piece.text), choice=index))
        elif piece.kind == "image":
            self._spoke = True
            members = {"images": [_image(piece.text, choice.images)]}
            events.append(_shown(maker.extra(delta_members=members, choice=index)))
            choice.images += 1
        else:
            self._spoke = True
            native = {"extra_content": {"google": {"parts": [piece.part]}}}
            chunk = _shown(maker.extra(delta_members=native, choice=index))
            if piece.text:
                chunk.deltas.append(Delta(index, Channel.CONTENT, 0, piece.text))
            events.append(chunk)

    def _whole_so_far(self) -> bool:
        return all(choice.reason is not None for choice in self._choices.values())

    def _complete(self, events: list[Event]) -> None:
        maker = self._maker or self._make(None)
        for index, choice in sorted(self._choices.items()):
            if choice.reason is not None:
                choice.finished = True
                # A call may follow the frame that named the reason.
                reason = "tool_calls" if choice.reason == "stop" and choice.calls else choice.reason
                events.append(maker.finish(reason, index))
        super()._complete(events)

    def _make(self, model: str | None) -> ChunkMaker:
        return ChunkMaker.of(self._call, self._answer_id, model)

    def failure(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> ProviderFailure:
        """What a status other than 2xx means."""
        return failure_from_status(status, headers, body)

    def answer(self, body: bytes) -> WholeAnswer | ProviderFailure:
        """Read a non-stream answer; an error or a blocked prompt in a 200 is a failure."""
        try:
            return self._whole(*read_frame(body))
        except (NotAnObject, *UNREADABLE):
            error = error_in(body)
            return garbage("The provider's answer cannot be read.") if error is None else failure_from_error(error)

    def _whole(self, frame: Frame, found: list[tuple[Candidate, list[Piece]]]) -> WholeAnswer | ProviderFailure:
        error = error_of(frame.error)
        if error is not None:
            return failure_from_error(error)
        blocked = _blocked(frame)
        if blocked is not None or not found:
            return blocked or garbage("The provider's answer has no candidates.")
        call = self._call
        answer_id = frame.response_id or UNKNOWN_ID
        choices: list[tuple[dict[str, Any], str]] = []
        for candidate, parts in sorted(found, key=lambda each: each[0].index):
            native = candidate.finish_reason
            called = any(piece.kind == "call" for piece in parts)
            reason = finish_reason("STOP" if native is None or native in NO_REASON else native, called=called)
            if reason is None:
                return failed_finish(native or "")
            choices.append((_message(parts, citations(candidate), answer_id, len(choices)), reason))
        self._usage.update(frame.usage_metadata or {})
        kinds = {piece.kind for _, parts in found for piece in parts}
        usage = self._usage.reported(spoke=bool(kinds - _UNSPOKEN), thought="thought" in kinds, final=True)
        if usage is not None and usage.partial:
            usage = None  # of a whole answer it is no report
        model = call.rename_to or frame.model_version or call.model
        body = whole_choices(answer_id, model, call.created, list(choices), usage.raw if usage is not None else b"")
        return WholeAnswer(RootObject(body), usage)

    def finish_chunk(self, choice: int, reason: str) -> bytes:
        """The payload that ends `choice` on the provider's behalf."""
        return (self._maker or self._make(None)).finish_payload(choice, reason)

    def usage_chunk(self, usage: bytes, extra: bytes) -> bytes:
        """The final usage payload."""
        return (self._maker or self._make(None)).usage_payload(usage, extra)

    @property
    def open_choices(self) -> tuple[int, ...]:
        """Choices that began and have not finished."""
        return tuple(sorted(index for index, choice in self._choices.items() if not choice.finished))


def _message(parts: list[Piece], notes: list[dict[str, Any]], answer_id: str, index: int) -> dict[str, Any]:
    """A whole answer's message."""
    google: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    others = []
    for piece in parts:
        if piece.kind == "call" and piece.call is not None:
            call_id = _call_id(piece, answer_id, index, len(calls))
            calls.append(tool_call(call_id, piece.call.name, piece.arguments, _signed(piece.text)))
        elif piece.kind == "signature":
            google["thought_signature"] = piece.text
        elif piece.kind == "image":
            images.append(_image(piece.text, len(images)))
        elif piece.kind == "part":
            others.append(piece.part)
    if others:
        google["parts"] = others
    extra = {"annotations": notes, "images": images, "extra_content": {"google": google} if google else None}
    text = "".join(piece.text for piece in parts if piece.kind == "text")
    return assistant_message(
        None if calls and not text else text,
        reasoning="".join(piece.text for piece in parts if piece.kind == "thought"),
        tool_calls=calls,
        extra={name: value for name, value in extra.items() if value},
    )


def _path(call: ChatCall) -> bytes:
    folder = next((each for each in _FOLDERS if call.model.startswith(each)), "")
    name = (folder or "models/") + quote(call.model.removeprefix(folder), safe="")
    return f"/{name}:{'streamGenerateContent?alt=sse' if call.stream else 'generateContent'}".encode()


def _call_id(piece: Piece, answer_id: str, index: int, tool: int) -> str:
    """The call's id. Gemini 2 gives none: then one that its place in the answer fixes, so that reading the same bytes
    again gives it again."""
    call = piece.call
    if call is not None and call.id:
        return call.id
    place = f"{answer_id}\n{index}\n{tool}\n{call.name if call is not None else ''}\n{piece.arguments}"
    return "call_" + hashlib.blake2s(place.encode(), digest_size=12).hexdigest()


def _signed(signature: str) -> dict[str, Any]:
    return {"extra_content": {"google": {"thought_signature": signature}}} if signature else {}


def _image(url: str, index: int) -> dict[str, Any]:
    """An image in an answer, as OpenRouter and the clients that know it have it."""
    return {"type": "image_url", "image_url": {"url": url}, "index": index}


def _shown(chunk: Chunk) -> Chunk:
    chunk.content = True
    return chunk


def _blocked(frame: Frame) -> ProviderFailure | None:
    feedback = frame.prompt_feedback
    if feedback is None or feedback.block_reason is None or feedback.block_reason in NO_REASON:
        return None
    return blocked_prompt(feedback.block_reason, feedback.block_reason_message)
