"""What the client learns of its bill: headers, `usage.cost` and the `x_tollgate` object.

Must not: compute an amount. Credits leave as exact decimals of integer micros.
"""

from __future__ import annotations

import functools

import msgspec

from metering.ledger import Settled
from providers.json_root import RootObject
from proxy.live_session import LiveSession
from proxy.settlement import Bill, Reply, charge_told

MICROS = 1_000_000
Headers = list[tuple[bytes, bytes]]


@functools.lru_cache(maxsize=1024)  # an answer tells the same amounts in headers and body
def credits_text(micros: int) -> str:
    """Micros as exact decimal credits without trailing zeros: 1_500_000 -> "1.5"."""
    if micros < 0:
        return f"-{credits_text(-micros)}"
    whole, part = divmod(micros, MICROS)
    return f"{whole}.{part:06d}".rstrip("0") if part else str(whole)


def usage_json(session: LiveSession, due: Bill, reply: Reply) -> bytes:
    """The usage object for the client: the provider's own where that is what was charged, else our counts; with `cost`,
    the charge in credits."""
    if due.source == "provider" and session.reported_raw is not None and session.carried is None:
        raw = session.reported_raw
    else:
        usage = due.usage
        raw = b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % (
            usage.prompt,
            usage.output,
            usage.prompt + usage.output,
        )
    micros = charge_told(session, due, reply)
    if micros is None:
        return raw
    cost = credits_text(micros).encode()
    if b'"cost"' not in raw and b"\\" not in raw:
        return b'%b,"cost":%b}' % (raw[:-1].rstrip(), cost)  # not empty: it names a token count
    return _set(RootObject(raw), {"cost": cost})


def session_members(session: LiveSession, due: Bill, reply: Reply) -> bytes:
    """`,"x_tollgate":{...}` to put beside `usage`; without `balance` when the ledger's reply did not come in time."""
    return b',"x_tollgate":' + _members(session, due, reply)


def _members(session: LiveSession, due: Bill, reply: Reply) -> bytes:
    """A JSON object. Session ids and amounts need no escapes."""
    micros = charge_told(session, due, reply)
    charge = "" if micros is None else f',"charge":{credits_text(micros)}'
    balance = f',"balance":{credits_text(reply.available)}' if isinstance(reply, Settled) else ""
    attempts = session.attempts
    return b'{"session":"%b"%b,"provider":%b,"attempts":%d}' % (
        session.ref.session.encode(),
        (charge + balance).encode(),
        msgspec.json.encode(attempts[-1].provider if attempts else None),
        len(attempts),
    )


def _set(root: RootObject, changes: dict[str, bytes]) -> bytes:
    """The body with members of ours. One that the provider sent twice is written once: a reader may take the first."""
    if root.duplicates and root.duplicates & changes.keys():
        root = RootObject(msgspec.json.encode(msgspec.json.decode(root.body, type=dict[str, msgspec.Raw])))
    return root.replaced(changes)


def billed_body(root: RootObject, session: LiveSession, due: Bill, reply: Reply) -> bytes:
    """A whole answer with `usage.cost` and `x_tollgate` spliced in; every other byte stays the provider's."""
    return _set(root, {"usage": usage_json(session, due, reply), "x_tollgate": _members(session, due, reply)})


def stream_headers(session: LiveSession) -> Headers:
    """Headers of a stream: what is known when it starts. The bill follows in the usage chunk."""
    headers = [
        (b"x-request-id", session.request_id.encode()),
        (b"x-tollgate-session", session.ref.session.encode()),
        (b"x-tollgate-route", session.route.encode()),
    ]
    if session.first_content_at is not None:
        headers += _attempt_headers(session)
    if session.limited:
        headers.append((b"x-tollgate-limited", b"credit"))
    return headers


def bill_headers(session: LiveSession, due: Bill, reply: Reply) -> Headers:
    """Headers of a whole answer or of an error after a hold."""
    headers = [
        (b"x-tollgate-session", session.ref.session.encode()),
        (b"x-tollgate-route", session.route.encode()),
        *_attempt_headers(session),
    ]
    micros = charge_told(session, due, reply)
    if micros is not None:
        headers.append((b"x-tollgate-charge", credits_text(micros).encode()))
    if isinstance(reply, Settled):
        headers.append((b"x-tollgate-balance", credits_text(reply.available).encode()))
    if session.limited:
        headers.append((b"x-tollgate-limited", b"credit"))
    return headers


def _attempt_headers(session: LiveSession) -> Headers:
    headers = [(b"x-tollgate-attempts", b"%d" % len(session.attempts))]
    if session.attempts:
        headers.append((b"x-tollgate-provider", session.attempts[-1].provider.encode()))
    return headers
