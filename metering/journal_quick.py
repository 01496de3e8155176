"""The short way from an outbox entry to rows, for the entry that nearly all are: a settlement as the script writes it.

Where anything is unlike that it says no, and `Rows.add` decides. Pure. Must not: answer with other rows than `Rows.add`
would (a test holds the two together), or add a part of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final

from metering.journal_fields import Poison, month_of_ms, read_metadata, read_slices
from metering.journal_rows import OUTCOMES, Rows

NAMES: Final = [b"t", b"u", b"ts", b"s", b"k", b"o", b"c", b"ab", b"d", b"sl", b"br", b"st", b"pc", b"m", b"pv", b"mt"]
"""The fields of a settlement that repays, and voids, nothing; in the script's order."""

KNOWN_IDS: Final = 65_536
"""Ids and words that are remembered as text: accounts, keys, grants and price versions come again."""

_MS_DIGITS = 13
"""Of a moment between 2001 and 2286."""

_DIGITS_MAX = 15
_OUTCOMES = {raw: raw.decode() for raw in OUTCOMES}
_UUID7 = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_AVAILABLE = "user:avail:"


@lru_cache(maxsize=KNOWN_IDS)
def _text_of_id(raw: bytes) -> str:
    return raw.decode() if _ID.fullmatch(raw) else ""


def settle_quickly(rows: Rows, shard: int, ep: int, n: int, flat: Sequence[bytes]) -> bool:
    """Add the rows of a settlement to `rows`; False when it has not, because something about the entry is unusual."""
    if flat[0::2] != NAMES:
        return False
    kind, u, ts, s, k, o, c, ab, d, sl, br, st, pc, m, pv, mt = flat[1::2]
    outcome, account, key, version = _OUTCOMES.get(o), _text_of_id(u), _text_of_id(k), _text_of_id(pv)
    if kind != b"settle" or br or not (outcome and account and key and version and _UUID7.fullmatch(s)):
        return False
    if len(ts) != _MS_DIGITS or len(st) != _MS_DIGITS or not (ts.isdigit() and st.isdigit()):
        return False
    for amount in (c, ab, d, pc, m):
        if not amount.isdigit() or len(amount) > _DIGITS_MAX:
            return False
    sid, charged, absorbed, debt = s.decode(), int(c), int(ab), int(d)
    month, taken = month_of_ms(int(sid[:8] + sid[9:13], 16)), _spent(sl)
    if month is None or taken is None or charged != debt + sum(part for _, part in taken):
        return False
    ended_ms, began_ms = int(ts), int(st)
    ended = _EPOCH + timedelta(0, ended_ms // 1000, ended_ms % 1000 * 1000)
    began = _EPOCH + timedelta(0, began_ms // 1000, began_ms % 1000 * 1000)
    moments = version, began, ended
    rows.session.append(
        (month, sid, shard, ep, n, account, key, outcome, charged, absorbed, debt, int(m), int(pc), *moments,
         *read_metadata(mt))
    )  # fmt: skip
    rows.entry.append((shard, ep, n, "settle", account, sid, ended))
    leg, posting = 0, rows.posting
    for gid, part in taken:
        rows.consumption.append((shard, ep, n, gid, part, 0, 0))
        if part:
            posting.append((shard, ep, n, leg, _AVAILABLE + gid, -part))
            leg += 1
    for ledger, part in (("user:debt", -debt), ("house:absorbed", -absorbed), ("earned", charged + absorbed)):
        if part:
            posting.append((shard, ep, n, leg, ledger, part))
            leg += 1
    return True


def _spent(listed: bytes) -> tuple[tuple[str, int], ...] | None:
    """Grants and what was spent of each; None where it cannot be read."""
    if not listed:
        return ()
    if b"," not in listed:
        gid, _, part = listed.partition(b"=")
        name = _text_of_id(gid)
        return ((name, int(part)),) if name and part.isdigit() and len(part) <= _DIGITS_MAX else None
    try:
        return tuple(read_slices({b"sl": listed}, b"sl").items())
    except Poison:
        return None
