"""The few rewrites that keep clients from breaking, and the payloads the gateway makes itself.

Must not: touch a member it does not have to. Every other member keeps its bytes.
"""

from __future__ import annotations

from typing import Any

import msgspec

from providers.codec import ChatCall

_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.encode
_EMPTY = b'{"id":"chatcmpl-tollgate","object":"chat.completion.chunk","created":0,"model":""}'
_ABSENT = msgspec.Raw()
_NO_CHOICES = msgspec.Raw(b"[]")


class _Own(msgspec.Struct, omit_defaults=True, gc=False):
    """A payload of ours: the members that identify the stream, as its first chunk has them, and choices."""

    id: msgspec.Raw = _ABSENT
    object: msgspec.Raw = _ABSENT
    created: msgspec.Raw = _ABSENT
    model: msgspec.Raw = _ABSENT
    service_tier: msgspec.Raw = _ABSENT
    system_fingerprint: msgspec.Raw = _ABSENT
    choices: msgspec.Raw = _ABSENT


_own = msgspec.json.Decoder(_Own).decode


def repaired(payload: bytes, rename_to: str | None, *, choices: bool, null_usage: bool) -> bytes:
    """The chunk without its usage (null where `null_usage`, as OpenAI sends it) and with the model renamed.

    With `choices`, every delta gets the role and every tool call the index that it lacks.
    """
    members: dict[str, Any] = dict(_members(payload))
    if rename_to is not None and "model" in members:
        members["model"] = rename_to
    if "usage" in members:
        members["usage"] = None
        if not null_usage:
            del members["usage"]
    members.pop("x_tollgate", None)  # ours to say, not a provider's
    if choices:
        raw_choices = msgspec.json.decode(bytes(members["choices"]), type=list[dict[str, msgspec.Raw]])
        members["choices"] = [_choice(choice) for choice in raw_choices]
    return _encode(members)


def _choice(choice: dict[str, msgspec.Raw]) -> dict[str, Any]:
    if "delta" not in choice or not bytes(choice["delta"]).startswith(b"{"):
        return dict(choice)
    delta: dict[str, Any] = dict(_members(choice["delta"]))
    if delta.get("role") is None or bytes(delta["role"]) == b"null":
        delta = {"role": "assistant", **{name: value for name, value in delta.items() if name != "role"}}
    if "tool_calls" in delta and bytes(delta["tool_calls"]).startswith(b"["):
        calls = msgspec.json.decode(bytes(delta["tool_calls"]), type=list[dict[str, msgspec.Raw]])
        delta["tool_calls"] = [_indexed(position, call) for position, call in enumerate(calls)]
    return {name: delta if name == "delta" else value for name, value in choice.items()}


def _indexed(position: int, call: dict[str, msgspec.Raw]) -> dict[str, Any]:
    if "index" in call and bytes(call["index"]) != b"null":
        return dict(call)
    return {"index": position, **{name: value for name, value in call.items() if name != "index"}}


def _own_payload(first: bytes | None, choices: msgspec.Raw, call: ChatCall) -> bytes:
    """A payload that looks like the stream's first chunk, with these choices."""
    own = _own(first or _EMPTY)
    if call.rename_to is not None or first is None:
        own.model = msgspec.Raw(_encode(call.rename_to or call.model))
    own.choices = choices
    return _encode(own)


def finish_payload(first: bytes | None, choice: int, reason: str, call: ChatCall) -> bytes:
    """A chunk that ends one choice."""
    end = {"index": choice, "delta": {}, "logprobs": None, "finish_reason": reason}
    return _own_payload(first, msgspec.Raw(_encode([end])), call)


def usage_payload(first: bytes | None, usage: bytes, extra: bytes, call: ChatCall) -> bytes:
    """The usage chunk: no choices, the given usage object, then `extra` (members with a leading comma, or nothing)."""
    head = _own_payload(first, _NO_CHOICES, call)
    return b'%b,"usage":%b%b}' % (head[:-1], usage, extra)
