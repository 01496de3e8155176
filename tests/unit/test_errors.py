"""The edge's table: every named error has a status, a body in OpenAI's form, and says nothing it should not."""

from __future__ import annotations

import inspect
import json

import pytest

from accounts import keys
from gateway import errors
from providers.events import ProviderFailure
from proxy import errors as call
from proxy.failures import failure_error

NAMED = [
    error
    for _, error in inspect.getmembers(call, inspect.isclass)
    if issubclass(error, call.CallError) and error not in (call.CallError, call.ProviderError)
]
KEY_ERRORS = [keys.MissingKey, keys.MalformedKey, keys.UnknownKey, keys.RevokedKey, keys.KeysUnavailable]


@pytest.mark.parametrize("error", [*NAMED, *KEY_ERRORS], ids=lambda error: error.__name__)
def test_every_named_error_has_a_row_and_a_public_message(error: type[Exception]) -> None:
    assert error in errors.TABLE
    body = errors.error_object(error())
    assert list(body) == ["message", "type", "param", "code"]
    assert body["message"] == inspect.getdoc(error)
    assert 400 <= errors.TABLE[error].status < 600


def test_no_row_stands_for_nothing() -> None:
    assert set(errors.TABLE) == {*NAMED, *KEY_ERRORS}


STATUSES = {
    call.InvalidBody: 400,
    call.UnsupportedParameter: 400,
    call.BodyTooLarge: 413,
    call.ModelNotFound: 404,
    call.ModelUnpriced: 503,
    call.OutOfCredit: 402,
    call.CreditInFlight: 402,
    call.RequestRateExceeded: 429,
    call.ParallelSessionsExceeded: 429,
    call.UpstreamUnreachable: 502,
    call.UpstreamGarbage: 502,
    call.UpstreamTimedOut: 504,
    call.UpstreamKeyRefused: 502,
    call.LedgerDown: 503,
    keys.MalformedKey: 401,
    keys.UnknownKey: 401,
    keys.RevokedKey: 401,
    keys.MissingKey: 401,
}


@pytest.mark.parametrize(
    ("error", "status"), STATUSES.items(), ids=lambda value: getattr(value, "__name__", str(value))
)
def test_statuses_are_the_contracts(error: type[Exception], status: int) -> None:
    assert errors.shown(error()).status == status


def test_lack_of_credit_forbids_retries_and_credit_in_flight_asks_for_one() -> None:
    assert errors.headers_of(call.OutOfCredit(metadata={"limit": "balance"}))["x-should-retry"] == "false"
    headers = errors.headers_of(call.CreditInFlight(retry_after_ms=1_000))
    assert (headers["x-should-retry"], headers["retry-after"]) == ("true", "1")


def test_a_providers_error_keeps_its_status_type_and_code() -> None:
    error = call.ProviderError("slow down", status=429, type_=None, code="rl", retry_after_ms=1_500)
    assert errors.shown(error) == errors.Shown(429, "rate_limit_error", "rl")
    assert errors.headers_of(error)["retry-after"] == "2"
    assert json.loads(errors.sse_payload(error))["error"]["message"] == "slow down"


def test_an_unknown_exception_shows_nothing_of_itself() -> None:
    body = errors.error_object(RuntimeError("SELECT secret FROM /etc/passwd"))
    assert body == {"message": call.InternalError.__doc__, "type": "server_error", "param": None, "code": None}


def test_what_a_provider_refuses_in_its_own_words_has_openais_code() -> None:
    def shown(failure: ProviderFailure) -> tuple[int, str | None]:
        look = errors.shown(failure_error(failure))
        return look.status, look.code

    assert shown(ProviderFailure("context_length", 400, "too long")) == (400, "context_length_exceeded")
    assert shown(ProviderFailure("content_policy", 400, "blocked")) == (400, "content_policy_violation")
    assert shown(ProviderFailure("content_policy", 400, "blocked", code="content_filter")) == (400, "content_filter")
    assert shown(ProviderFailure("caller", 400, "wrong")) == (400, None)
