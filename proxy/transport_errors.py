"""What can go wrong between the gateway and an upstream, as types a caller can decide on.

Must not: know providers, routes or HTTP statuses of our own answers; name a header's value or a
body (they hold secrets).
"""

from __future__ import annotations

from typing import Literal

Phase = Literal["connect", "head", "body"]
"""Where an exchange is: connecting (request not written), waiting for the response's head, reading its body."""

Bound = Literal["connect", "head", "idle", "total"]
"""Which time limit was reached."""


class TransportError(Exception):
    """An exchange failed. `sent`: bytes of the request may have reached the upstream. `phase`: how far it had come."""

    def __init__(self, message: str, *, sent: bool, phase: Phase) -> None:
        super().__init__(message)
        self.sent = sent
        self.phase = phase


class ConnectFailed(TransportError):
    """No connection: the name does not resolve, the port refuses, TLS fails, or the pool is full. Nothing was sent."""


class UpstreamTimeout(TransportError):
    """A time limit was reached; `bound` says which."""

    def __init__(self, message: str, *, sent: bool, phase: Phase, bound: Bound) -> None:
        super().__init__(message, sent=sent, phase=phase)
        self.bound = bound


class UpstreamClosed(TransportError):
    """The upstream ended the connection before the response was complete by its own framing."""


class UpstreamProtocolError(TransportError):
    """The upstream's bytes are not an HTTP/1.1 response, or break a bound of ours."""


class ExchangeAborted(TransportError):
    """We ended the exchange ourselves: abort(), release() before the end, cancellation, or the transport was closed."""
