"""What can go wrong on a call, named. A docstring is the default public message; `gateway.errors` maps it to a status.

Must not: know HTTP statuses or render anything.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class CallError(Exception):
    """The request could not be served."""

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        metadata: Mapping[str, str | int | msgspec.Raw] | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        """`param` names the field at fault; `metadata` and `retry_after_ms` reach the client."""
        super().__init__(message or type(self).__doc__)
        self.message = message or str(type(self).__doc__)
        self.param = param
        self.metadata = metadata
        self.retry_after_ms = retry_after_ms
        self.headers: list[tuple[bytes, bytes]] = []
        """The bill's headers, once a session had been held."""


class InvalidBody(CallError):
    """The request body is not valid JSON."""


class InvalidValue(CallError):
    """A field of the request has an invalid value."""


class UnsupportedParameter(CallError):
    """The request has a field that this gateway does not accept."""


class BodyTooLarge(CallError):
    """The request body is too large."""


class BodyTooSlow(CallError):
    """The request body did not arrive in time."""


class ModelNotFound(CallError):
    """The model does not exist or you do not have access to it."""


class ModelUnpriced(CallError):
    """The model has no price configured, so the gateway refuses to call it."""


class RouteNotFound(CallError):
    """Unknown request URL."""


class OutOfCredit(CallError):
    """The account has not enough credit for this request."""


class CreditInFlight(CallError):
    """The account's remaining credit is held by requests in flight. Retry when they have finished."""


class RequestRateExceeded(CallError):
    """The API key has reached its limit of requests per minute."""


class ParallelSessionsExceeded(CallError):
    """The API key has reached its limit of parallel sessions."""


class AccountBlocked(CallError):
    """The account is blocked."""


class IdempotencyConflict(CallError):
    """The Idempotency-Key was already used with another request body. Use another key for another request."""


class IdempotencyInFlight(CallError):
    """The first request with this Idempotency-Key is still in progress."""


class IdempotencyFinished(CallError):
    """The request with this Idempotency-Key has already finished; it is not run again."""


class Overloaded(CallError):
    """The gateway is at its limit of live sessions. Retry shortly."""


class Draining(CallError):
    """The gateway is shutting down. Retry on another instance."""


class LedgerDown(CallError):
    """The credit ledger is unavailable, so no request is admitted. Retry shortly."""


class UpstreamUnreachable(CallError):
    """The provider could not be reached."""


class UpstreamGarbage(CallError):
    """The provider's answer could not be understood."""


class UpstreamTruncated(CallError):
    """The provider's answer ended before it was complete."""


class UpstreamTimedOut(CallError):
    """The provider did not answer in time."""


class UpstreamKeyRefused(CallError):
    """The provider refused the gateway's own key or account."""


class ProviderUnavailable(CallError):
    """No provider of this model can be called now: they failed or asked for a pause. Retry shortly."""


class ProviderBusy(CallError):
    """The gateway is at its limit of calls to the providers of this model. Retry shortly."""


class ProviderNotAllowed(CallError):
    """No provider of this model is within the account's and the request's preferences."""


class ContextLengthExceeded(CallError):
    """The prompt is too long for every provider of this model."""


class LeaseLost(CallError):
    """The gateway lost touch with the credit ledger and ended the stream."""


class InternalError(CallError):
    """The gateway failed while serving the request."""


class ProviderError(CallError):
    """The provider reported an error."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        type_: str | None,
        code: str | None,
        param: str | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        """The provider's own status, type and code go on to the client."""
        super().__init__(message, param=param, retry_after_ms=retry_after_ms)
        self.status = status
        self.type = type_
        self.code = code
