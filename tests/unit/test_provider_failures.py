"""What the readers of providers' errors have in common: when to come back, whose fault a status is, texts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.codec import ChatCall, Upstream
from providers.events import ProviderFailure
from providers.failures import (
    MESSAGE_CHARS_MAX,
    RETRY_S_MAX,
    UNTOLD,
    decoded,
    kind_of,
    message_in,
    retry_after_s,
    word,
)
from providers.registry import CODECS, wire
from proxy.failures import AttemptFailed, failure_of
from proxy.transport_errors import ConnectFailed, UpstreamProtocolError

DATE = b"Fri, 21 Nov 2025 10:00:00 GMT"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({b"retry-after": b"7"}, 7.0),
        ({b"Retry-After": b" 1.5 "}, 1.5),
        ({b"retry-after": b"soon"}, None),
        ({b"retry-after": b"-1"}, None),
        ({b"retry-after": b"nan"}, None),
        ({b"retry-after": b"86401"}, None),
        ({b"retry-after": b"\xff"}, None),
        ({b"retry-after-ms": b"250"}, 0.25),
        ({b"retry-after": b"1", b"retry-after-ms": b"250"}, 0.25),
        ({b"retry-after": b"Fri, 21 Nov 2025 10:00:30 GMT", b"retry-after-ms": b"250"}, 0.25),
        ({b"retry-after": b"2", b"retry-after-ms": b"soon"}, 2.0),
        ({b"retry-after": b"Fri, 21 Nov 2025 10:00:30 GMT", b"date": DATE}, 30.0),
        ({b"retry-after": b"Fri, 21 Nov 2025 10:00:30 GMT", b"date": b"now"}, None),
        ({b"retry-after": b"Fri, 21 Nov 2025 10:00:30 GMT"}, None),
        ({b"retry-after": b"Fri, 21 Nov 2025 09:59:59 GMT", b"date": DATE}, None),
        ({b"retry-after": b"Mon, 24 Nov 2025 10:00:00 GMT", b"date": DATE}, None),
    ],
)
def test_a_pause_is_read_in_milliseconds_in_seconds_or_between_two_dates(
    headers: dict[bytes, bytes], seconds: float | None
) -> None:
    assert retry_after_s(list(headers.items())) == seconds


def test_of_two_equal_headers_the_first_counts() -> None:
    assert retry_after_s([(b"retry-after", b"3"), (b"retry-after", b"9")]) == 3


@given(st.lists(st.tuples(st.sampled_from([b"retry-after", b"retry-after-ms", b"date"]), st.binary(max_size=40))))
def test_no_header_breaks_the_reading(headers: list[tuple[bytes, bytes]]) -> None:
    found = retry_after_s(headers)
    assert found is None or 0 <= found <= RETRY_S_MAX


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_every_codec_tells_the_pause_that_a_provider_asks_for(codec: str) -> None:
    one = wire(codec).codec(Upstream("p", codec, b""), ChatCall(b"", "m", True))
    headers = [(b"date", DATE), (b"retry-after", b"Fri, 21 Nov 2025 10:00:30 GMT")]
    assert one.failure(429, headers, b"").retry_after_s == 30
    assert one.failure(503, [*headers, (b"retry-after-ms", b"1500")], b"{}").retry_after_s == 1.5


def test_a_status_tells_whose_fault_it_is() -> None:
    statuses = {
        "caller": (400, 404, 422, 499),
        "key_refused": (401, 402, 403),
        "rate_limited": (429,),
        "overloaded": (503, 529),
        "server": (408, 500, 502, 504, 302),
    }
    assert {kind: {kind_of(status) for status in some} for kind, some in statuses.items()} == {
        kind: {kind} for kind in statuses
    }
    assert [kind_of(status, (408, 499)) for status in (408, 499, 400)] == ["server", "server", "caller"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b"1e999", b'"\xff"'])
def test_a_body_that_is_no_json_has_no_value(body: bytes) -> None:
    assert decoded(body) is None


def test_texts_have_bounds_and_odd_ones_are_untold() -> None:
    assert message_in({"Message": "x" * 9_999}, "message", "Message") == "x" * MESSAGE_CHARS_MAX
    assert message_in({"message": "", "Message": 5}, "message", "Message") == UNTOLD
    assert (word("x" * 999), word(5), word(None)) == ("x" * 200, None, None)
    assert decoded(json.dumps({"a": 1}).encode()) == {"a": 1}


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (
            ConnectFailed("cannot connect to a:1: Connection refused", sent=False, phase="connect"),
            "cannot connect to a:1",
        ),
        (UpstreamProtocolError("bad bytes: a prompt", sent=True, phase="head"), ""),
        (AttemptFailed(ProviderFailure("caller", 400, "a prompt", code="invalid_api_key")), "invalid_api_key"),
        (AttemptFailed(ProviderFailure("caller", 400, "a prompt", code="a prompt, as a code")), ""),
        (AttemptFailed(ProviderFailure("caller", 400, "a prompt")), ""),
    ],
)
def test_the_log_is_told_why_in_our_words_or_by_a_code_and_never_in_a_providers_words(
    error: Exception, detail: str
) -> None:
    found = failure_of(error, answered=False).detail
    assert found.startswith(detail)
    assert "a prompt" not in found
