"""An attempt's failure as the client is told of it, from what the provider or the transport said.

Must not: decide what is done about it (`providers.retry` does), or repeat a key's refusal to the client.
"""

from __future__ import annotations

import re

import msgspec

from providers.events import ProviderFailure
from providers.json_root import RootObject
from providers.retry import Fault, fault_of
from proxy.errors import (
    CallError,
    ProviderError,
    UpstreamGarbage,
    UpstreamKeyRefused,
    UpstreamTimedOut,
    UpstreamTruncated,
    UpstreamUnreachable,
)
from proxy.transport_errors import (
    Bound,
    ConnectFailed,
    ExchangeAborted,
    UpstreamClosed,
    UpstreamProtocolError,
    UpstreamTimeout,
)

_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
"""A provider's code that may be logged: a name, and no text."""
CODES = {"context_length": "context_length_exceeded", "content_policy": "content_policy_violation"}
"""OpenAI's codes of what a provider refused in its own words, where it names no code."""
QUOTED_BYTES_MAX = 256 * 1024
_decode = msgspec.json.Decoder().decode


class AttemptFailed(Exception):
    """The provider said that the attempt failed."""

    def __init__(self, failure: ProviderFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Failure(msgspec.Struct, frozen=True):
    """A failed attempt: its fault as `providers.retry` names it, what the client would be told, how long the provider
    asked to be left alone, whether it is the provider's whole account that is refused, and what only the log is told:
    our own words about it, or the provider's code. `share_over`: it was cut because others wait for their turn."""

    fault: Fault
    error: CallError
    retry_after_s: float | None = None
    everywhere: bool = False
    detail: str = ""
    share_over: bool = False


def failure_of(error: Exception, *, answered: bool, model: str = "", root: RootObject | None = None) -> Failure:
    """What an attempt's exception comes to. `answered`: its 2xx had come; `model`: the one that was asked for; `root`:
    the client's request."""
    if isinstance(error, AttemptFailed):
        failure = error.failure
        if root is not None and failure.status in (404, 410) and _quotable(root, model):
            model = ""
        code = failure.code if failure.code is not None and _CODE.fullmatch(failure.code) else ""
        return Failure(
            fault_of(failure, model), failure_error(failure), failure.retry_after_s, failure.status == 401, code
        )
    public = transport_error(error)
    if isinstance(error, UpstreamTimedOut):  # our own bound of the time to the first content
        return Failure("stall" if answered else "head_timeout", public, share_over=True)
    ours = isinstance(error, ConnectFailed | UpstreamClosed | UpstreamGarbage)  # nothing of the provider's is in these
    return Failure(_fault(error), public, detail=str(error) if ours else "")


def _quotable(root: RootObject, model: str) -> bool:
    """Whether a provider that names the model may be quoting the request (a file of that name is not there): then a
    caller could take the model from everybody else. Nobody looks through a large request for it."""
    if len(root.body) > QUOTED_BYTES_MAX:
        return True
    try:  # decoded: a name in escapes is quoted without them
        told = [(name, _decode(root.raw(name) or b"null")) for name in root.spans if name != "model"]
        return model.lower() in msgspec.json.encode(told).decode().lower()
    except (msgspec.DecodeError, RecursionError):
        return True


def _fault(error: Exception) -> Fault:
    if isinstance(error, UpstreamTimeout):
        return _BOUNDS[error.bound]
    if isinstance(error, ConnectFailed):
        return "connect"
    if isinstance(error, UpstreamProtocolError):
        return "protocol"
    return "garbage" if isinstance(error, UpstreamGarbage) else "closed"


_BOUNDS: dict[Bound, Fault] = {
    "connect": "connect_timeout",
    "head": "head_timeout",
    "idle": "stall",
    "total": "total_timeout",
}


def failure_error(failure: ProviderFailure) -> CallError:
    """The named error of a provider's failure. A refused key is our fault: its text never reaches the client."""
    if failure.kind == "key_refused":
        return UpstreamKeyRefused()
    if failure.kind == "garbage":
        return UpstreamGarbage(failure.message)
    if failure.kind == "truncated":
        return UpstreamTruncated(failure.message)
    return ProviderError(
        failure.message,
        status=failure.status,
        type_=failure.type,
        code=failure.code or CODES.get(failure.kind),
        param=failure.param,
        retry_after_ms=None if failure.retry_after_s is None else int(failure.retry_after_s * 1000),
    )


def transport_error(error: Exception) -> CallError:
    """The named error of a transport's failure."""
    if isinstance(error, CallError):
        return error
    if isinstance(error, UpstreamTimeout):
        return UpstreamTimedOut()
    if isinstance(error, ConnectFailed):
        return UpstreamUnreachable()
    if isinstance(error, UpstreamProtocolError):
        return UpstreamGarbage()
    if isinstance(error, ExchangeAborted):
        return UpstreamTruncated()
    return UpstreamTruncated("The provider closed the connection before its answer was complete.")
