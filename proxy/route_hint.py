"""The client's `x-tollgate-route`: what a request says about providers, and what is left of it within its key. Pure.

    providers=a,b; exclude=c; prefer=d,e; tags=eu

Words in any order, each at most once; names without a word before them are `prefer`. A name is `provider` or
`provider/model`. Must not: know which providers exist, or widen what account and key allow.
"""

from __future__ import annotations

from functools import lru_cache

from accounts.preferences import RoutingPreferences, checked
from providers.routing import Preferences
from proxy.errors import InvalidValue

HEADER = b"x-tollgate-route"
NAME = "x-tollgate-route"
HEADER_BYTES_MAX = 1_024
REMEMBERED_MAX = 1_024
"""Headers, and combinations with preferences, that are kept read."""

_LISTS = {"providers": "allowed", "exclude": "excluded", "prefer": "preferred", "tags": "tags"}
_WORD_CHARS_SHOWN = 32


def read_hint(sent: list[bytes]) -> Preferences | None:
    """The hint, from the values of its header as they were sent; None for no header and for an empty one.

    Raises InvalidValue for a header that came twice, is longer than HEADER_BYTES_MAX, or does not follow the grammar.
    """
    if not sent:
        return None
    if len(sent) > 1:
        raise _invalid("it was sent more than once")
    if len(sent[0]) > HEADER_BYTES_MAX:
        raise _invalid(f"it is longer than {HEADER_BYTES_MAX} bytes")
    return _read(sent[0])


@lru_cache(maxsize=REMEMBERED_MAX)
def combined(principal: RoutingPreferences | None, hint: Preferences | None) -> Preferences | None:
    """What routing is told: the principal's preferences narrowed by the request's hint. None where nothing is said."""
    if principal is None:
        return hint
    own = Preferences(
        None if principal.allowed is None else frozenset(principal.allowed),
        frozenset(principal.excluded),
        principal.preferred,
        frozenset(principal.tags),
    )
    return own if hint is None else own.narrowed(hint)


@lru_cache(maxsize=REMEMBERED_MAX)
def _read(value: bytes) -> Preferences | None:
    if not value.isascii():
        raise _invalid("it has characters outside ASCII")
    text = value.decode().strip()
    if not text:
        return None
    lists: dict[str, tuple[str, ...]] = {}
    for part in text.split(";"):
        word, names = _part(part)
        if word in lists:
            raise _invalid(f"'{word}' is in it more than once")
        lists[word] = names
    allowed = lists.get("providers")
    return Preferences(
        None if allowed is None else frozenset(allowed),
        frozenset(lists.get("exclude", ())),
        lists.get("prefer", ()),
        frozenset(lists.get("tags", ())),
    )


def _part(part: str) -> tuple[str, tuple[str, ...]]:
    """The word of a part and its names."""
    before, equals, after = part.partition("=")
    word = before.strip() if equals else "prefer"
    if word not in _LISTS:
        raise _invalid(f"'{word[:_WORD_CHARS_SHOWN]}' is not one of {', '.join(_LISTS)}")
    names = [name.strip() for name in (after if equals else before).split(",")]
    if not all(names):
        raise _invalid(f"a name is missing in '{word}'")
    try:
        return word, checked(_LISTS[word], names)
    except ValueError as error:
        raise _invalid(f"'{word}': {error}") from None


def _invalid(reason: str) -> InvalidValue:
    return InvalidValue(
        f"Invalid header '{NAME}': {reason}. Write for example 'providers=a,b; exclude=c; prefer=d,e/model; tags=eu'.",
        param=NAME,
    )
