"""What an account or a key says about the providers that may answer it: the lists, their bounds, how they combine.

Must not: know which providers exist (configuration changes), touch a store, or choose between candidates.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from accounts.keys import KeysUnavailable

log = logging.getLogger(__name__)

NAMES_MAX = 64
"""Names in one list, as an account, a key or a request may write it."""
NAME_CHARS_MAX = 128

_NAME = re.compile(r"[A-Za-z0-9._:@+-]+(?:/[A-Za-z0-9._:/@+-]*[A-Za-z0-9._:@+-])?", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
_SHOWN_CHARS = 64


class RoutingPreferences(msgspec.Struct, frozen=True, omit_defaults=True, cache_hash=True):
    """Which providers (`provider` or `provider/model`) may answer, and which first. `allowed` None is all, `()` is
    none; a provider must carry all `tags`; `preferred` come first, in this order."""

    allowed: tuple[str, ...] | None = None
    excluded: tuple[str, ...] = ()
    preferred: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


LISTS = RoutingPreferences.__struct_fields__
_NOTHING = RoutingPreferences()
_decode = msgspec.json.Decoder(RoutingPreferences).decode


def checked(name: str, given: Iterable[str]) -> tuple[str, ...]:
    """One list (`name` is of LISTS) without repetitions. Raises ValueError, which says what is wrong with it."""
    words = tuple(dict.fromkeys(given))
    if len(words) > NAMES_MAX:
        raise ValueError(f"at most {NAMES_MAX} names are taken")
    for word in words:
        if name == "tags":
            if not _TAG.fullmatch(word):
                raise ValueError(f"'{word[:_SHOWN_CHARS]}' is not a tag (1-64 letters, digits, - or _)")
        elif len(word) > NAME_CHARS_MAX or not _NAME.fullmatch(word):
            raise ValueError(
                f"'{word[:_SHOWN_CHARS]}' is not a provider or provider/model "
                f"(1-{NAME_CHARS_MAX} letters, digits and ._:/@+-)"
            )
    return words


def changed(
    before: RoutingPreferences | None, lists: Mapping[str, Sequence[str]], *, clear: bool = False
) -> RoutingPreferences | None:
    """`before`, or with `clear` nothing, with these lists in place of its own; an empty list takes one away.

    None: nothing is said any more. Raises ValueError.
    """
    own: dict[str, tuple[str, ...] | None] = {name: checked(name, given) for name, given in lists.items()}
    if "allowed" in own:
        own["allowed"] = own["allowed"] or None
    after = msgspec.structs.replace(_NOTHING if clear or before is None else before, **own)
    return None if after == _NOTHING else after


def narrowed(account: RoutingPreferences | None, key: RoutingPreferences | None) -> RoutingPreferences | None:
    """The account's with its key's: a key never widens what its account allows; its order goes first."""
    if account is None or key is None:
        return account if key is None else key
    return RoutingPreferences(
        _allowed_by_both(account.allowed, key.allowed),
        _joined(account.excluded, key.excluded),
        _joined(key.preferred, account.preferred),
        _joined(account.tags, key.tags),
    )


def to_text(preferences: RoutingPreferences | None) -> str | None:
    """As Postgres keeps them: JSON, or null for none."""
    return None if preferences is None else msgspec.json.encode(preferences).decode()


def from_text(stored: str | None) -> RoutingPreferences | None:
    """Read what Postgres keeps. Raises KeysUnavailable when it is damaged: what is allowed cannot be told then."""
    if stored is None:
        return None
    try:
        return _decode(stored)
    except msgspec.DecodeError:
        log.error("preferences in Postgres are not readable")
        raise KeysUnavailable from None


def _allowed_by_both(first: tuple[str, ...] | None, second: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if first is None or second is None:
        return first if second is None else second
    return tuple(name for name in _joined(first, second) if _within(name, first) and _within(name, second))


def _within(name: str, allowed: tuple[str, ...]) -> bool:
    """A provider/model is also within a list that has its provider."""
    return name in allowed or name.partition("/")[0] in allowed


def _joined(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))
