"""The client's `Idempotency-Key`: checked, kept only as its hash, and what a key that a session already has answers.

Must not: keep, log or show the plain key, or talk to the ledger.
"""

from __future__ import annotations

import hashlib
import re

import msgspec

from metering.ledger import Past, Repeated
from proxy.answer import credits_text
from proxy.errors import CallError, IdempotencyFinished, IdempotencyInFlight, InvalidValue

HEADER = b"idempotency-key"
NAME = "Idempotency-Key"

_FORM = re.compile(rb"[!-~]{1,255}")


def read_key(sent: list[bytes]) -> str:
    """The SHA-256 (hex) of the key, from the values of its header as they were sent; "" for no key.

    Raises InvalidValue for a header that came twice and for what is not 1 to 255 visible ASCII characters.
    """
    if len(sent) > 1:
        raise InvalidValue(f"The header '{NAME}' was sent more than once.", param=NAME)
    key = sent[0] if sent else b""
    if not key:
        return ""
    if not _FORM.fullmatch(key):
        raise InvalidValue(f"Invalid header '{NAME}': expected 1 to 255 visible ASCII characters.", param=NAME)
    return hashlib.sha256(key).hexdigest()


def repeat_error(taken: Repeated, past: Past | None) -> CallError | None:
    """Why the session that has the key stands in the way; None when it is void or forgotten, which frees the key."""
    if past is None or past.outcome == "void":
        return None
    if past.outcome is None:
        return IdempotencyInFlight(metadata={"session": taken.session})
    charge = msgspec.Raw(credits_text(past.charged).encode())
    return IdempotencyFinished(metadata={"session": taken.session, "charge": charge})
