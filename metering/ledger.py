"""The ledger's words: what a caller asks of Redis and the typed answers. Amounts are integer micros.

Must not: talk to Redis (that is `redis_ledger`) or know HTTP. Semantics: docs of each script in `lua/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

MICROS_MAX = 2**53 - 1
"""Largest amount that Lua's doubles and Redis hold exactly."""


class AccountRef(msgspec.Struct, frozen=True):
    """Who pays: minted id (``[A-Za-z0-9_-]{1,64}``) and its fixed virtual shard (0..127)."""

    id: str
    shard: int


class KeyLimits(msgspec.Struct, frozen=True):
    """A key's limits as reserve enforces them; None means none."""

    requests_per_minute: int | None = None
    parallel_sessions: int | None = None


class HoldRequest(msgspec.Struct, frozen=True):
    """One reserve. `want` is held when credit allows, less is accepted down to `minimum`.

    `prompt_cost` is stored with the session; `metadata` (JSON bytes, at most 4 KiB) describes it for a sweep.
    `idempotency` is the SHA-256 (hex) of the client's idempotency key, '' without one; `past` names the void session
    from which this one may take that key over.
    """

    session: str
    account: AccountRef
    key: str
    want: int
    minimum: int
    prompt_cost: int
    body_hash: str
    owner: str
    price_version: str
    metadata: bytes
    limits: KeyLimits = KeyLimits()
    idempotency: str = ""
    past: str = ""


class SessionRef(msgspec.Struct, frozen=True):
    """A held session as its owner names it; `fence` is what reserve answered."""

    session: str
    account: AccountRef
    key: str
    fence: int


RefusalReason = Literal[
    "balance", "in_flight", "requests", "parallel", "debt", "blocked", "conflict", "tombstone", "finished", "bounds"
]


class Held(msgspec.Struct, frozen=True):
    """Reserve succeeded (or had succeeded before, with the same arguments)."""

    held: int
    available: int
    fence: int
    lease_ms: int
    repeated: bool = False


class Refused(msgspec.Struct, frozen=True):
    """Reserve stored nothing. `available` and `held` are the account's; `retry_after_ms` 0 when waiting is useless."""

    reason: RefusalReason
    available: int
    held: int
    retry_after_ms: int = 0


class Repeated(msgspec.Struct, frozen=True):
    """Reserve stored nothing: the account's idempotency key belongs to `session`, with the same body or another."""

    session: str
    same_body: bool


class Progressed(msgspec.Struct, frozen=True):
    """The checkpoint counts, the lease is renewed; `held` is the hold now (it may be less than wanted)."""

    held: int
    available: int
    applied: bool = True
    """False for a checkpoint older than the last one: nothing changed, and the lease was not renewed by this call."""


class Gone(msgspec.Struct, frozen=True):
    """The session is no longer the caller's: swept, settled or unknown. Nothing may be written to the client."""

    state: Literal["final", "fenced", "unknown"]
    charged: int = 0


class Settled(msgspec.Struct, frozen=True):
    """The terminal entry. Repeating the call answers the same `charged` with `repeated`."""

    charged: int
    absorbed: int
    available: int
    entry: int
    repeated: bool = False


class Corrected(msgspec.Struct, frozen=True):
    """A swept session was charged `charged` micros more; `absorbed` is what of the difference nobody could pay."""

    charged: int
    absorbed: int
    available: int
    entry: int
    repeated: bool = False


class NotCorrected(msgspec.Struct, frozen=True):
    """Nothing changed. `late`: more than an hour after the sweep; `lower`: not more than it charged; `open`, `ended`:
    the session was not swept; `fenced`, `unknown`: it is not the caller's."""

    reason: Literal["late", "lower", "open", "ended", "fenced", "unknown"]


Policy = Literal["cutoff", "grace", "postpaid"]
"""What an account may do when its grants are used up. Grace and postpaid work alike and are meant differently: a short
overdraft until the next grant, and an invoice."""


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """An account's policy. `limit` is the most its debt and held credit line may come to, 0 under cutoff; `revision`
    (from 1) rises with each change."""

    account: AccountRef
    policy: Policy
    limit: int
    revision: int


@dataclass(frozen=True, slots=True)
class PolicySet:
    """`applied` False: the ledger has a newer revision. `debt` and `line` are the account's now."""

    applied: bool
    debt: int
    line: int
    entry: int


Outcome = Literal["completed", "aborted", "cut", "error", "void", "swept"]


@dataclass(frozen=True, slots=True)
class Past:
    """A session as Redis still knows it, for a day after its end: its outcome, None while it runs, and its charge."""

    outcome: Outcome | None
    charged: int = 0


@dataclass(frozen=True, slots=True)
class Balance:
    """An account as admission sees it."""

    available: int
    held: int
    debt: int
    charged: int
    sessions: int
    line: int = 0
    """The part of `held` that stands on the credit line."""
    limit: int = 0
    policy: Policy = "cutoff"


@dataclass(frozen=True, slots=True)
class Swept:
    """A session that was settled on behalf of its dead owner: charged what it had last metered."""

    session: str
    account: AccountRef
    charged: int
    absorbed: int
    entry: int


@dataclass(frozen=True, slots=True)
class GrantRequest:
    """Credit to issue. `expires_ms` is 0 for never; `priority` 0 (first) to 99; ids match ``[A-Za-z0-9_-]{1,64}``."""

    id: str
    account: AccountRef
    amount: int
    priority: int = 50
    expires_ms: int = 0
    created_ms: int = 0


@dataclass(frozen=True, slots=True)
class Granted:
    """The grant is in force; `entry` is its journal number and `repaid` the part that went to debt at once."""

    available: int
    entry: int
    repaid: int
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class GrantRefused:
    """Nothing changed: the id stands for another grant or a revoked one, 64 grants are open, or a value is out of its
    bounds."""

    reason: Literal["conflict", "full", "revoked", "bounds"]


@dataclass(frozen=True, slots=True)
class Expired:
    """What was left of a grant when its time was over and became breakage; `entry` is its journal number."""

    grant: str
    account: AccountRef
    amount: int
    entry: int


@dataclass(frozen=True, slots=True)
class Voided:
    """`amount` micros were voided by a revocation or an adjustment, decided once, in journal entry `entry`."""

    amount: int
    available: int
    entry: int
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class ChangeRefused:
    """Nothing changed: the id stands for another change, or a value is out of its bounds."""

    reason: Literal["conflict", "bounds"]


@dataclass(frozen=True, slots=True)
class GrantState:
    """One grant's parts: issued = available + held + consumed + expired + voided.

    What sessions hold of a `revoked` one and do not spend will be voided."""

    issued: int
    available: int
    held: int
    consumed: int
    expired: int
    voided: int
    expires_ms: int
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class SessionState:
    """An open session: what it holds (also per grant), what it metered, and its lease's end on the shard's clock."""

    held: int
    metered: int
    slices: dict[str, int]
    lease_until_ms: int | None
    line: int = 0
    """The part of `held` that stands on the credit line."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An account at one instant: the state after journal entry `entry` of epoch `epoch`."""

    epoch: int
    entry: int
    now_ms: int
    balance: Balance
    grants: dict[str, GrantState]
    burn_order: tuple[str, ...]
    sessions: dict[str, SessionState]


class LedgerError(Exception):
    """The ledger could not answer."""


class LedgerUnavailable(LedgerError):
    """Redis is unreachable, too slow, out of memory, or frozen. The outcome of the call is unknown."""


class LedgerFrozen(LedgerUnavailable):
    """The shard's epoch is missing or not ours: admission state was lost and must be rebuilt first."""
