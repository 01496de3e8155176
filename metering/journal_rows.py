"""One outbox entry becomes Postgres rows: session, entry, postings that sum to zero, consumption per grant.

Pure. Must not: talk to any store, guess at money (an entry whose money cannot be read is Poison, and is kept whole), or
refuse an entry for its metadata (that part is opaque: what cannot be read becomes null).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from metering.journal_corrections import read_correction, read_policy
from metering.journal_fields import (
    METADATA_COLUMNS,
    Poison,
    Row,
    month_of,
    read_amount,
    read_id,
    read_metadata,
    read_moment,
    read_slices,
    shown,
)

SESSION_COLUMNS: Final = (
    "month", "sid", "shard", "ep", "n", "account_id", "key_id", "outcome", "charged", "absorbed", "debt", "metered",
    "prompt_cost", "price_version", "started_at", "ended_at", *METADATA_COLUMNS,
)  # fmt: skip
ENTRY_COLUMNS: Final = ("shard", "ep", "n", "type", "account_id", "sid", "at")
POSTING_COLUMNS: Final = ("shard", "ep", "n", "leg", "ledger", "amount")
CONSUMPTION_COLUMNS: Final = ("shard", "ep", "n", "grant_id", "amount", "breakage", "voided")

OUTCOMES: Final = frozenset({b"completed", b"aborted", b"cut", b"error", b"void", b"swept"})
_WORD = re.compile(rb"[!-~]{0,128}")


@dataclass(slots=True)
class Rows:
    """Rows of any number of entries, as tuples in the order of the `*_COLUMNS`.

    `confirmed`, `revoked` and `adjusted` are (id, ep, n) of what was written first and applied by the entry: a grant, a
    grant's revocation, an adjustment. `policies` is (account id, revision) of what the account's row says.
    """

    session: list[Row] = field(default_factory=list)
    entry: list[Row] = field(default_factory=list)
    posting: list[Row] = field(default_factory=list)
    consumption: list[Row] = field(default_factory=list)
    confirmed: list[Row] = field(default_factory=list)
    revoked: list[Row] = field(default_factory=list)
    adjusted: list[Row] = field(default_factory=list)
    correction: list[Row] = field(default_factory=list)
    policies: list[Row] = field(default_factory=list)

    def add(self, shard: int, ep: int, n: int, fields: Mapping[bytes, bytes]) -> None:
        """Convert one outbox entry. Raises Poison, and then has added nothing."""
        at = (shard, ep, n)
        kind = fields.get(b"t")
        if kind == b"settle":
            self._settle(at, fields)
        elif kind == b"grant":
            self._grant(at, fields)
        elif kind == b"expire":
            self._expire(at, fields)
        elif kind == b"revoke":
            self._revoke(at, fields)
        elif kind == b"adjust":
            self._adjust(at, fields)
        elif kind == b"policy":
            self._policy(at, fields)
        elif kind == b"correct":
            self._correct(at, fields)
        else:
            raise Poison(f"the type {shown(kind)} is unknown")

    def _settle(self, at: tuple[int, int, int], fields: Mapping[bytes, bytes]) -> None:
        session = _session(at, fields)
        charged, absorbed, debt = session[8:11]
        spent, repaid, broken, voided = (read_slices(fields, name) for name in (b"sl", b"rp", b"br", b"vd"))
        if charged != sum(spent.values()) + debt:
            raise Poison(f"the charge {charged} is not the consumption {sum(spent.values())} plus the debt {debt}")
        legs = [(f"user:avail:{gid}", -amount) for gid, amount in spent.items()]
        legs += [("user:debt", -debt), ("house:absorbed", -absorbed), ("earned", charged + absorbed)]
        for gid, amount in repaid.items():
            legs += [(f"user:avail:{gid}", -amount), ("user:debt", amount)]
        for gid, amount in broken.items():
            legs += [(f"user:avail:{gid}", -amount), ("breakage", amount)]
        for gid, amount in voided.items():
            legs += [(f"user:avail:{gid}", -amount), ("issuance", amount)]
        taken = [
            (*at, gid, spent.get(gid, 0) + repaid.get(gid, 0), broken.get(gid, 0), voided.get(gid, 0))
            for gid in {**spent, **repaid, **broken, **voided}
        ]
        self.session.append(session)
        self.entry.append((*at, "settle", session[5], session[1], session[15]))
        self.consumption += taken
        self._post(at, legs)

    def _grant(self, at: tuple[int, int, int], fields: Mapping[bytes, bytes]) -> None:
        account, gid = read_id(fields, b"u"), read_id(fields, b"g")
        amount, repaid, moment = read_amount(fields, b"a"), read_amount(fields, b"rp"), read_moment(fields, b"ts")
        if amount == 0 or repaid > amount:
            raise Poison(f"a grant of {amount} cannot repay {repaid}")
        self.entry.append((*at, "grant", account, None, moment))
        self.confirmed.append((gid, at[1], at[2]))
        if repaid:
            self.consumption.append((*at, gid, repaid, 0, 0))
        self._post(at, [("issuance", -amount), (f"user:avail:{gid}", amount - repaid), ("user:debt", repaid)])

    def _expire(self, at: tuple[int, int, int], fields: Mapping[bytes, bytes]) -> None:
        account, gid = read_id(fields, b"u"), read_id(fields, b"g")
        amount, moment = read_amount(fields, b"a"), read_moment(fields, b"ts")
        if amount == 0:
            raise Poison(f"grant {gid} expired with nothing left")
        self.entry.append((*at, "expire", account, None, moment))
        self.consumption.append((*at, gid, 0, amount, 0))
        self._post(at, [(f"user:avail:{gid}", -amount), ("breakage", amount)])

    def _revoke(self, at: tuple[int, int, int], fields: Mapping[bytes, bytes]) -> None:
        account, gid = read_id(fields, b"u"), read_id(fields, b"g")
        amount, moment = read_amount(fields, b"a"), read_moment(fields, b"ts")
        self.entry.append((*at, "revoke", account, None, moment))
        self.revoked.append((gid, at[1], at[2]))
        self._void(at, {gid: amount})

    def _adjust(self, at: tuple[int, int, int], fields: Mapping[bytes, bytes]) -> None:
        account, change, taken = read_id(fields, b"u"), read_id(fields, b"j"), read_slices(fields, b"sl")
        amount, moment = read_amount(fields, b"a"), read_moment(fields, b"ts")
        if amount != sum(taken.values()):
            raise Poison(f"the adjustment {amount} is not the sum {sum(taken.values())} of its slices")
        self.entry.append((*at, "adjust", account, None, moment))
        self.adjusted.append((change, at[1], at[2]))
        self._void(at, taken)

    def _void(self, at: tuple[int, int, int], voided: Mapping[str, int]) -> None:
        legs: list[tuple[str, int]] = []
        for gid, amount in voided.items():
            if amount:
                self.consumption.append((*at, gid, 0, 0, amount))
            legs += [(f"user:avail:{gid}", -amount), ("issuance", amount)]
        self._post(at, legs)

    def _policy(self, at: tuple[int, int, int], fields: Mapping[bytes, bytes]) -> None:
        account, revision, moment = read_policy(fields)
        self.entry.append((*at, "policy", account, None, moment))
        self.policies.append((account, revision))

    def _correct(self, at: tuple[int, int, int], fields: Mapping[bytes, bytes]) -> None:
        row, taken, legs = read_correction(at, fields)
        self.correction.append(row)
        self.entry.append((*at, "correct", row[5], row[4], row[10]))
        self.consumption += [(*at, gid, amount, 0, 0) for gid, amount in taken.items()]
        self._post(at, legs)

    def _post(self, at: tuple[int, int, int], legs: Sequence[tuple[str, int]]) -> None:
        moved = (leg for leg in legs if leg[1] != 0)
        self.posting += [(*at, number, ledger, amount) for number, (ledger, amount) in enumerate(moved)]


def entry_id(raw: bytes) -> tuple[int, int]:
    """A stream id `<ep>-<n>` as two integers. Raises ValueError."""
    ep, n = raw.split(b"-")
    return int(ep), int(n)


def pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """A stream entry's flat field list as a mapping."""
    names = iter(flat)
    return dict(zip(names, names, strict=True))


def payload(flat: Sequence[bytes]) -> str:
    """A stream entry, whole and in order, as JSON for the dead table; bytes that are no text become base64."""
    return msgspec.json.encode({"fields": [_kept(item) for item in flat]}).decode()


def _session(at: tuple[int, int, int], fields: Mapping[bytes, bytes]) -> Row:
    sid = read_id(fields, b"s")
    outcome = fields.get(b"o")
    if outcome not in OUTCOMES:
        raise Poison(f"the outcome {shown(outcome)} is unknown")
    version = fields.get(b"pv", b"")
    if not _WORD.fullmatch(version):
        raise Poison(f"the price version {shown(version)} is no word")
    started = read_moment(fields, b"st")
    return (
        month_of(sid, int(fields[b"st"])),
        sid,
        *at,
        read_id(fields, b"u"),
        read_id(fields, b"k"),
        outcome.decode(),
        read_amount(fields, b"c"),
        read_amount(fields, b"ab"),
        read_amount(fields, b"d"),
        read_amount(fields, b"m"),
        read_amount(fields, b"pc"),
        version.decode(),
        started,
        read_moment(fields, b"ts"),
        *read_metadata(fields.get(b"mt", b"")),
    )


def _kept(item: bytes) -> str | dict[str, str]:
    try:
        text = item.decode()
    except UnicodeDecodeError:
        text = "\0"
    return {"base64": base64.b64encode(item).decode()} if "\0" in text else text
