"""The name of a request's answer: a hash over everything that may change the answer, and nothing that does not. Pure.

The body counts in a canonical form: members sorted, blanks gone, strings by their characters, numbers by their value
(1 and 1.0 stay two). Members of `NOT_IN_KEY` are left out: they are bookkeeping between the client and its provider.
A body that two readers may understand differently (a doubled member anywhere, a number beyond any reader's range) has
no name, so its answer is never kept: what one provider made of it could be given to who asked for the other reading.
Must not: read a clock, speak to Redis, or return anything that tells what was asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import msgspec

from providers.routing import Preferences

FORMAT = b"tollgate answer 1"
"""Changes whenever the canonical form or the stored form does."""

NOT_IN_KEY = frozenset(
    ("stream", "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
"""`stream` is there as the answer's form. The others say for whom, or where to look for a cached prompt."""


class _Ambiguous(Exception):
    """The body means different things to different readers."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Ambiguous
    return found


def _refused(_: str) -> Any:
    raise _Ambiguous


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refused)
_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical(body: bytes) -> bytes | None:
    """The canonical form of a body, without the members that do not count. None for one that may not be cached."""
    try:
        root = _decoder.decode(body.decode())
        if not isinstance(root, dict):
            return None
        return _encoder.encode({name: value for name, value in root.items() if name not in NOT_IN_KEY}).encode()
    except (_Ambiguous, ValueError, RecursionError):  # a number without end or of thousands of digits is a ValueError
        return None


def named_providers(preferences: Preferences | None) -> list[bytes]:
    """The hint that says which providers may answer, and which first: equal for equal preferences, however they came
    about."""
    return [] if preferences is None else [msgspec.json.encode(preferences, order="deterministic")]


def answer_name(scope: str, salt: bytes, hints: Iterable[bytes], body: bytes, *, stream: bool) -> str | None:
    """64 hex digits. `scope` is the account's id, or "" for answers shared by all accounts; `salt` names route,
    candidates and prices; `hints` say which candidates may answer. None as `canonical`."""
    form = canonical(body)
    if form is None:
        return None
    digest = blake2b(digest_size=32)
    for part in (FORMAT, scope.encode(), salt, b"stream" if stream else b"whole", *hints, form):
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.hexdigest()
