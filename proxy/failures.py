"""An attempt's failure as the client is told of it, from what the provider or the transport said.

Must not: decide what is done about it (`providers.retry` does), or repeat a key's refusal to the client.
"""

from __future__ import annotations

from providers.events import ProviderFailure
from proxy.errors import (
    CallError,
    ProviderError,
    UpstreamGarbage,
    UpstreamKeyRefused,
    UpstreamTimedOut,
    UpstreamTruncated,
    UpstreamUnreachable,
)
from proxy.transport_errors import ConnectFailed, ExchangeAborted, UpstreamProtocolError, UpstreamTimeout

CODES = {"context_length": "context_length_exceeded", "content_policy": "content_policy_violation"}
"""OpenAI's codes of what a provider refused in its own words, where it names no code."""


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
