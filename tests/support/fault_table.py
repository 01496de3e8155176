"""What follows each fault of a provider, by how far its answer had come: the table of docs/failover.md, as data.

Written from what failover is to do, not from what the code does: tests hold gateway and page to it. Must not: do I/O.
Prices are one micro a token. The prompt has 8 tokens, what is delivered before a fault 2, and a whole answer is billed
as 9 and 4.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Point = Literal["headers", "content", "after"]
"""The fault comes before the response's headers, before its first content, or after content was delivered."""
Form = Literal["stream", "whole"]
Then = Literal["next", "retry, next", "none"]
"""What is done where a second candidate is there: it is asked, the first is asked again before, or nobody is."""
Left = Literal["", "counted", "paused", "key", "missing"]
"""Whether the candidate is passed by afterwards: not for this; once it has happened too often; for the time that the
provider named; as long as keys are refused; as long as a model is missing."""

BOTH: tuple[Form, ...] = ("stream", "whole")
STREAM: tuple[Form, ...] = ("stream",)
WHOLE: tuple[Form, ...] = ("whole",)

PROMPT, DELIVERED = 8, 2
ANSWERED = 13
"""What a complete answer costs."""
BROKEN = PROMPT + DELIVERED
"""What a stream costs that breaks off after content."""
DONE = (200, None)
"""Instead of an error: the answer."""

GONE, INVALID, CUT = (502, "upstream_unreachable"), (502, "upstream_invalid"), (502, "upstream_truncated")
LATE, KEY, SERVER = (504, "upstream_timeout"), (502, "upstream_key_refused"), (502, None)
LENGTH, POLICY = (400, "context_length_exceeded"), (400, "content_filter")


@dataclass(frozen=True)
class Row:
    """One fault at one point. `outcome`: the failed attempt's in the session. `told`: status (200 after content: the
    error is in the stream) and code where there is no second candidate. `tries`: of the only candidate, by the
    default `retry`. `charge` in micros and `ending` in the journal are those of a call that nobody else answers."""

    fault: str
    point: Point
    forms: tuple[Form, ...]
    outcome: str
    then: Then
    told: tuple[int, str | None]
    tries: int
    left: Left
    charge: int = 0
    ending: str = "void"
    route: str = ""
    """A further key of the route."""

    def slug(self, form: Form) -> str:
        """Its name in the tests' configuration."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.fault} {self.point} {form}".lower())


ROWS: tuple[Row, ...] = (
    Row("connection refused", "headers", BOTH, "connect", "retry, next", GONE, 2, "counted"),
    Row("certificate not trusted", "headers", BOTH, "connect", "retry, next", GONE, 2, "counted"),
    Row("name does not resolve", "headers", BOTH, "connect", "retry, next", GONE, 2, "counted"),
    Row("TLS handshake hangs", "headers", BOTH, "connect_timeout", "next", LATE, 2, "counted"),
    Row("400", "headers", BOTH, "caller", "none", (400, None), 1, ""),
    Row("401", "headers", BOTH, "key_refused", "next", KEY, 1, "key"),
    Row("402", "headers", BOTH, "key_refused", "next", KEY, 1, "key"),
    Row("403", "headers", BOTH, "key_refused", "next", KEY, 1, "key"),
    Row("404", "headers", BOTH, "model_missing", "next", (404, "model_not_found"), 1, "missing"),
    Row("408", "headers", BOTH, "server", "retry, next", (408, None), 2, "counted"),
    Row("422", "headers", BOTH, "caller", "none", (422, None), 1, ""),
    Row("429", "headers", BOTH, "rate_limited", "next", (429, None), 2, ""),
    Row("429, retry-after 2 s", "headers", BOTH, "rate_limited", "next", (429, None), 2, "paused"),
    Row("429, retry-after 30 s", "headers", BOTH, "rate_limited", "next", (429, None), 1, "paused"),
    Row("500", "headers", BOTH, "server", "retry, next", (500, None), 2, "counted"),
    Row("503", "headers", BOTH, "overloaded", "next", (503, None), 2, "counted"),
    Row("503, retry-after 30 s", "headers", BOTH, "overloaded", "next", (503, None), 1, "paused"),
    Row("prompt too long", "headers", BOTH, "context_length", "none", LENGTH, 1, ""),
    Row(
        *("prompt too long, route falls back on it", "headers", BOTH, "context_length", "next", LENGTH, 1, ""),
        route='fall_back_on = ["context_length"]',
    ),
    Row("content refused", "headers", BOTH, "content_policy", "none", POLICY, 1, ""),
    Row(
        *("content refused, route falls back on it", "headers", BOTH, "content_policy", "next", POLICY, 1, ""),
        route='fall_back_on = ["content_policy"]',
    ),
    Row("redirect", "headers", BOTH, "garbage", "next", INVALID, 2, "counted"),
    Row("hang", "headers", BOTH, "head_timeout", "next", LATE, 1, "counted"),
    Row("cut", "headers", BOTH, "closed", "retry, next", CUT, 2, "counted"),
    Row("reset", "headers", BOTH, "closed", "retry, next", CUT, 2, "counted"),
    Row("garbage", "headers", BOTH, "protocol", "next", INVALID, 2, "counted"),
    Row("huge head", "headers", BOTH, "protocol", "next", INVALID, 2, "counted"),
    Row("slow drip without end", "headers", BOTH, "head_timeout", "next", LATE, 1, "counted"),
    Row("hang", "content", BOTH, "stall", "next", LATE, 1, "counted"),
    Row("cut", "content", BOTH, "closed", "next", CUT, 2, "counted"),
    Row("reset", "content", BOTH, "closed", "next", CUT, 2, "counted"),
    Row("ends early", "content", STREAM, "truncated", "next", CUT, 2, "counted"),
    Row("ends early", "content", WHOLE, "garbage", "next", INVALID, 2, "counted"),
    Row("empty 200", "content", STREAM, "truncated", "next", CUT, 2, "counted"),
    Row("empty 200", "content", WHOLE, "garbage", "next", INVALID, 2, "counted"),
    Row("garbage", "content", BOTH, "garbage", "next", INVALID, 2, "counted"),
    Row("wrong content type", "content", BOTH, "garbage", "next", INVALID, 2, "counted"),
    Row("in-band error", "content", BOTH, "server", "next", SERVER, 2, "counted"),
    Row("in-band error, 429", "content", BOTH, "rate_limited", "next", (429, "429"), 2, ""),
    Row("in-band error, 401", "content", BOTH, "key_refused", "next", KEY, 1, "key"),
    Row("in-band error, 400", "content", BOTH, "caller", "none", (400, "400"), 1, ""),
    Row("huge frame", "content", BOTH, "garbage", "next", INVALID, 2, "counted"),
    Row("slow drip without end", "content", STREAM, "stall", "next", LATE, 1, "counted"),
    Row("slow drip without end", "content", WHOLE, "total_timeout", "none", LATE, 1, ""),
    Row("slow drip, in time", "content", BOTH, "completed", "none", DONE, 1, "", ANSWERED, "completed"),
    Row("hang", "after", STREAM, "stall", "none", (200, "upstream_timeout"), 1, "counted", BROKEN, "error"),
    Row("cut", "after", STREAM, "closed", "none", (200, "upstream_truncated"), 1, "counted", BROKEN, "error"),
    Row("reset", "after", STREAM, "closed", "none", (200, "upstream_truncated"), 1, "counted", BROKEN, "error"),
    Row("ends early", "after", STREAM, "truncated", "none", (200, "upstream_truncated"), 1, "counted", BROKEN, "error"),
    Row("garbage", "after", STREAM, "garbage", "none", (200, "upstream_invalid"), 1, "counted", BROKEN, "error"),
    Row("in-band error", "after", STREAM, "server", "none", (200, None), 1, "counted", BROKEN, "error"),
    Row("in-band error, 429", "after", STREAM, "rate_limited", "none", (200, "429"), 1, "", BROKEN, "error"),
    Row(
        *("in-band error, 401", "after", STREAM, "key_refused", "none", (200, "upstream_key_refused"), 1, "key"),
        *(BROKEN, "error"),
    ),
    Row("in-band error, 400", "after", STREAM, "caller", "none", (200, "400"), 1, "", BROKEN, "error"),
    Row("huge frame", "after", STREAM, "garbage", "none", (200, "upstream_invalid"), 1, "counted", BROKEN, "error"),
    Row(
        *("slow drip without end", "after", STREAM, "total_timeout", "none", (200, "upstream_timeout"), 1, ""),
        *(BROKEN, "error"),
    ),
    Row("slow drip, in time", "after", STREAM, "completed", "none", DONE, 1, "", ANSWERED, "completed"),
)
"""Every fault at every point where it can happen. A whole answer has no point after content: nothing of it is
delivered before its end."""
