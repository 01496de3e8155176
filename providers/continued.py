"""The stream of an attempt that goes on with another's text, made one with it: the client sees a single answer.

Must not: know a provider, or pass on anything but the text and the end: thinking, positions of citations and the like
belong to a reply that the client does not see the beginning of. Continuations are rare, so every chunk is read and
written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from providers.codec import Answer, ChatCall, Codec, UpstreamRequest
from providers.events import Channel, Chunk, Completed, Delta, Event, Failed, ProviderFailure, UsageSeen
from providers.seam import Seam, SeamBroken

MEMBERS = ("id", "object", "created", "model", "service_tier", "system_fingerprint")
"""What is the same in all chunks of a stream."""

_LEFT_OUT = frozenset(
    (
        *("role", "content", "refusal", "tool_calls", "function_call", "audio"),
        *("reasoning", "reasoning_content", "reasoning_details", "thinking", "thinking_blocks"),
        *("annotations", "citations"),
    )
)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_choices = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode
_encode = msgspec.json.Encoder().encode
_UNREADABLE = (msgspec.DecodeError, RecursionError, ValueError)
_NULL = msgspec.Raw(b"null")


class Identity:
    """The members that say whose stream a chunk belongs to, as the first attempt's first chunk has them."""

    __slots__ = ("_own",)

    def __init__(self, own: Mapping[str, msgspec.Raw]) -> None:
        self._own = own

    @classmethod
    def of(cls, payload: bytes) -> Identity:
        """Of a chunk that was delivered. Raises msgspec.DecodeError when it is no JSON object."""
        members = _members(payload)
        return cls({name: members[name].copy() for name in MEMBERS if name in members})

    def put_on(self, payload: bytes) -> bytes:
        """The payload with these members, and none of its own of that name. Raises msgspec.DecodeError."""
        return self.chunk(_members(payload))

    def chunk(self, members: Mapping[str, Any]) -> bytes:
        """A payload of these members and of the others that `members` has."""
        return _encode({**self._own, **{name: value for name, value in members.items() if name not in MEMBERS}})


class ContinuedCodec:
    """Wraps the codec of the attempt that goes on, see `providers.codec.Codec` for the methods' contract. A reply that
    does not go on where the text stopped fails as garbage. Chunks have content deltas of choice 0 and nothing else."""

    def __init__(self, inner: Codec, seam: Seam, identity: Identity) -> None:
        self._inner = inner
        self._seam = seam
        self._identity = identity
        self._spoken = False
        self._thought = False
        self._finished = False
        self._over = False

    def request(self, call: ChatCall, request_id: str) -> UpstreamRequest:
        """The inner codec's, for a body of `continued_body`."""
        return self._inner.request(call, request_id)

    def feed(self, data: bytes) -> list[Event]:
        """Events completed by `data`; text that is held back comes with a later one."""
        return self._joined(self._inner.feed(data))

    def end_of_stream(self) -> list[Event]:
        """What the inner codec says, with the text that was held back."""
        return self._joined(self._inner.end_of_stream())

    def failure(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> ProviderFailure:
        """The inner codec's."""
        return self._inner.failure(status, headers, body)

    def answer(self, body: bytes) -> Answer | ProviderFailure:
        """The inner codec's: only streams are continued."""
        return self._inner.answer(body)

    def finish_chunk(self, choice: int, reason: str) -> bytes:
        """The payload that ends the client's stream."""
        return self._identity.put_on(self._inner.finish_chunk(choice, reason))

    def usage_chunk(self, usage: bytes, extra: bytes) -> bytes:
        """The client's final payload, see `Codec`."""
        return self._identity.put_on(self._inner.usage_chunk(usage, extra))

    @property
    def open_choices(self) -> tuple[int, ...]:
        """The client's one choice, which began before this attempt did."""
        return () if self._finished else (0,)

    def _joined(self, events: list[Event]) -> list[Event]:
        joined: list[Event] = []
        for event in events:
            if self._over:
                break
            try:
                self._event(event, joined)
            except SeamBroken:
                self._fail(joined, "The provider did not go on where the answer had stopped.")
            except _UNREADABLE:
                self._fail(joined, "The provider sent a chunk that cannot be read.")
        return joined

    def _event(self, event: Event, joined: list[Event]) -> None:
        """Raises SeamBroken, and one of _UNREADABLE."""
        if isinstance(event, Chunk):
            chunk = self._chunk(event)
            if chunk is not None:
                joined.append(chunk)
        elif isinstance(event, UsageSeen):
            joined.append(event)
        elif isinstance(event, Completed):
            if not self._finished:
                self._rest(joined)
            self._over = True
            joined.append(Completed(self.open_choices))
        else:
            self._over = True
            joined.append(event)

    def _rest(self, joined: list[Event]) -> None:
        """A stream may be complete without a finish: what is held back needs a chunk of its own."""
        text = self._ended("stop")
        if text:
            choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
            payload = self._identity.chunk({"choices": [choice]})
            joined.append(Chunk(payload, [Delta(0, Channel.CONTENT, 0, text)], content=True))

    def _chunk(self, event: Chunk) -> Chunk | None:
        members: dict[str, Any] = dict(_members(event.payload))
        raw = members.get("choices", _NULL)
        if bytes(raw) in (b"null", b"[]"):
            return Chunk(self._identity.chunk(members))  # filter results of a prompt and the like
        choice = next((each for each in _choices(raw) if each.get("index", 0) == 0 or _is_first(each)), None)
        if choice is None or self._finished:
            return None
        delta = choice.get("delta", _NULL)
        given = _members(delta) if bytes(delta).startswith(b"{") else {}
        text = self._seam.feed(self._heard(event, bytes(given.get("content", _NULL))))
        finished = 0 in event.finished
        if finished:
            text += self._ended(_text(choice.get("finish_reason")))
        kept: dict[str, Any] = {name: value for name, value in given.items() if name not in _LEFT_OUT}
        if text:
            kept = {"content": text, **kept}
        if not kept and not finished:
            return None
        self._finished = finished
        members["choices"] = [{**choice, "delta": kept}]
        deltas = [Delta(0, Channel.CONTENT, 0, text)] if text else []
        return Chunk(self._identity.chunk(members), deltas, (0,) if finished else (), bool(text or finished))

    def _heard(self, event: Chunk, content: bytes) -> str:
        """The chunk's text. Raises SeamBroken for a refusal or a tool's call in the place of it."""
        text = ""
        for delta in event.deltas:
            if delta.channel is Channel.CONTENT and content not in (b"null", b'""', b"[]"):
                text += delta.text if delta.choice == 0 else ""
            elif delta.channel in (Channel.CONTENT, Channel.REASONING):
                self._thought = True  # content that no member has is thinking in parts
            else:
                raise SeamBroken
        self._spoken = self._spoken or bool(text)
        return text

    def _ended(self, reason: str) -> str:
        """What was held back. Nothing said is fine: there was nothing to add. But a model that goes on with its own
        message does not think first: a server that reads the rest of the answer as thinking has lost it."""
        if self._thought and not self._spoken and reason == "stop" and self._seam.style != "instruction":
            raise SeamBroken
        return self._seam.end()

    def _fail(self, joined: list[Event], message: str) -> None:
        self._over = True
        joined.append(Failed(ProviderFailure("garbage", 502, message)))


def _is_first(choice: Mapping[str, msgspec.Raw]) -> bool:
    return bytes(choice["index"]) in (b"0", b"null")


def _text(raw: msgspec.Raw | None) -> str:
    value = None if raw is None else msgspec.json.decode(raw)
    return value if isinstance(value, str) else ""
