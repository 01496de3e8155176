"""What the client learns of its bill: headers, `usage.cost` and the `x_tollgate` object.

Must not: compute an amount. Credits leave as exact decimals of integer micros.
"""

from __future__ import annotations

import msgspec

from metering.ledger import Settled
from providers.json_root import RootObject
from proxy.live_session import LiveSession
from proxy.settlement import Bill

MICROS = 1_000_000
Headers = list[tuple[bytes, bytes]]


def credits_text(micros: int) -> str:
    """Micros as exact decimal credits without trailing zeros: 1_500_000 -> "1.5"."""
    whole, part = divmod(abs(micros), MICROS)
    text = f"{whole}.{part:06d}".rstrip("0").rstrip(".")
    return f"-{text}" if micros < 0 else text


def usage_json(session: LiveSession, due: Bill, settled: Settled | None) -> bytes:
    """The usage object for the client: the provider's own where that is what was charged, else our counts; with `cost`,
    the charge in credits."""
    cost = credits_text(due.micros if settled is None else settled.charged).encode()
    if due.source == "provider" and session.reported_raw is not None:
        return RootObject(session.reported_raw).replaced({"cost": cost})
    usage = due.usage
    total = usage.prompt + usage.output
    return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,"cost":%b}' % (
        usage.prompt,
        usage.output,
        total,
        cost,
    )


def session_members(session: LiveSession, due: Bill, settled: Settled | None) -> bytes:
    """`,"x_tollgate":{...}` to put beside `usage`; without `balance` when the ledger's reply did not come in time."""
    return b',"x_tollgate":' + msgspec.json.encode(_members(session, due, settled))


def _members(session: LiveSession, due: Bill, settled: Settled | None) -> dict[str, object]:
    members: dict[str, object] = {
        "session": session.id,
        "charge": _number(due.micros if settled is None else settled.charged),
    }
    if settled is not None:
        members["balance"] = _number(settled.available)
    members["provider"] = session.attempts[-1].provider if session.attempts else None
    members["attempts"] = len(session.attempts)
    return members


def _number(micros: int) -> msgspec.Raw:
    return msgspec.Raw(credits_text(micros).encode())


def billed_body(body: bytes, session: LiveSession, due: Bill, settled: Settled | None) -> bytes:
    """A whole answer with `usage.cost` and `x_tollgate` spliced in; every other byte stays the provider's."""
    return RootObject(body).replaced(
        {"usage": usage_json(session, due, settled), "x_tollgate": msgspec.json.encode(_members(session, due, settled))}
    )


def stream_headers(session: LiveSession) -> Headers:
    """Headers of a stream: what is known when it starts. The bill follows in the usage chunk."""
    headers = [
        (b"x-request-id", session.request_id.encode()),
        (b"x-tollgate-session", session.id.encode()),
        (b"x-tollgate-route", session.route.encode()),
    ]
    if session.first_content_at is not None:
        headers += _attempt_headers(session)
    if session.limited:
        headers.append((b"x-tollgate-limited", b"credit"))
    return headers


def bill_headers(session: LiveSession, due: Bill, settled: Settled | None) -> Headers:
    """Headers of a whole answer or of an error after a hold."""
    headers = [
        (b"x-tollgate-session", session.id.encode()),
        (b"x-tollgate-route", session.route.encode()),
        (b"x-tollgate-charge", credits_text(due.micros if settled is None else settled.charged).encode()),
        *_attempt_headers(session),
    ]
    if settled is not None:
        headers.append((b"x-tollgate-balance", credits_text(settled.available).encode()))
    if session.limited:
        headers.append((b"x-tollgate-limited", b"credit"))
    return headers


def _attempt_headers(session: LiveSession) -> Headers:
    headers = [(b"x-tollgate-attempts", b"%d" % len(session.attempts))]
    if session.attempts:
        headers.append((b"x-tollgate-provider", session.attempts[-1].provider.encode()))
    return headers
