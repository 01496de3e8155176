"""The Idempotency-Key header: what is a key, and what a key that a session already has answers."""

from __future__ import annotations

import hashlib

import pytest

from gateway import errors
from metering.ledger import Outcome, Past, Repeated
from proxy.errors import IdempotencyConflict, IdempotencyFinished, IdempotencyInFlight, InvalidValue
from proxy.idempotency import read_key, repeat_error

TAKEN = Repeated("sid", True)


@pytest.mark.parametrize("sent", [[], [b""]])
def test_no_header_and_an_empty_one_are_no_key(sent: list[bytes]) -> None:
    assert read_key(sent) == ""


@pytest.mark.parametrize("key", [b"k", b"x" * 255, b'"8e03978e-40d5-43dd-bc93-6894a57f9324"', b"!~"])
def test_a_key_of_visible_ascii_is_kept_as_its_hash(key: bytes) -> None:
    assert read_key([key]) == hashlib.sha256(key).hexdigest()


@pytest.mark.parametrize("sent", [[b"x" * 256], [b"a b"], [b"a\tb"], ["é".encode()], [b"\x7f"], [b"a\n"], [b"a", b"a"]])
def test_anything_else_is_refused_with_the_headers_name_and_without_the_key(sent: list[bytes]) -> None:
    with pytest.raises(InvalidValue) as caught:
        read_key(sent)
    assert caught.value.param == "Idempotency-Key"
    assert "Idempotency-Key" in caught.value.message
    assert errors.shown(caught.value).status == 400


@pytest.mark.parametrize("outcome", ["completed", "aborted", "cut", "error", "swept"])
def test_a_finished_session_is_told_with_its_charge_as_an_exact_number(outcome: Outcome) -> None:
    error = repeat_error(TAKEN, Past(outcome, 1_500_001))
    assert isinstance(error, IdempotencyFinished)
    assert b'"metadata":{"session":"sid","charge":1.500001}' in errors.sse_payload(error)


@pytest.mark.parametrize("outcome", ["completed", "aborted", "cut", "error", "swept"])
def test_a_charge_of_zero_frees_no_key_of_a_session_that_may_have_delivered(outcome: Outcome) -> None:
    error = repeat_error(TAKEN, Past(outcome, 0))
    assert isinstance(error, IdempotencyFinished)
    assert b'"charge":0}' in errors.sse_payload(error)


def test_a_running_session_is_told_by_its_id() -> None:
    error = repeat_error(TAKEN, Past(None))
    assert isinstance(error, IdempotencyInFlight)
    assert error.metadata == {"session": "sid"}


@pytest.mark.parametrize("past", [Past("void", 0), None])
def test_a_void_or_forgotten_session_stands_in_nobodys_way(past: Past | None) -> None:
    assert repeat_error(TAKEN, past) is None


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (IdempotencyConflict(), 422, "idempotency_conflict"),
        (IdempotencyInFlight(), 409, "idempotency_in_flight"),
        (IdempotencyFinished(), 409, "idempotency_finished"),
    ],
)
def test_no_sdk_repeats_a_repeat(error: Exception, status: int, code: str) -> None:
    assert errors.shown(error) == errors.Shown(status, "invalid_request_error", code, retry=False)
    assert errors.headers_of(error)["x-should-retry"] == "false"
