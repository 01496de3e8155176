"""A model of the ledger's scripts: one account, its sessions, their holds and leases, in plain Python.

Written from the scripts' headers and the design, not from their code; `tests/integration` holds the scripts to a model
of their own. Must not: know who calls, lose anything, or be late: that is `wire`'s part.
"""

from __future__ import annotations

from dataclasses import dataclass

Reply = list[bytes]
Args = dict[str, str]
HOUR_MS = 3_600_000


def _n(number: int) -> bytes:
    return b"%d" % number


@dataclass
class Row:
    """A session in the ledger. `deadline` on the server's clock; `state` is H (held), T (ended) or V (tombstone)."""

    sid: str
    state: str
    fence: str = ""
    held: int = 0
    metered: int = 0
    seq: int = 0
    deadline: int = 0
    outcome: str = ""
    due: int = 0
    charged: int = 0
    absorbed: int = 0
    entry: int = 0
    ended_ms: int = 0
    swept_for: int = 0
    """What the sweep charged, before a correction."""
    corrected: tuple[int, int, int] | None = None
    """Charged, absorbed and entry of the correction."""


@dataclass(frozen=True)
class Entry:
    """One terminal entry of the journal."""

    sid: str
    outcome: str
    charged: int


class Server:
    """The account and its sessions. `now` is moved by the schedule, in milliseconds; it never goes back."""

    def __init__(self, credit: int) -> None:
        self.now = 5_000_000
        self.granted = credit
        self.available = credit
        self.elsewhere = 0
        self.rows: dict[str, Row] = {}
        self.journal: list[Entry] = []

    @property
    def held(self) -> int:
        """Micros that open sessions hold."""
        return sum(row.held for row in self.rows.values() if row.state == "H")

    def run(self, verb: str, args: Args) -> Reply:
        """One script's answer."""
        done: Reply = getattr(self, f"_{verb}")(args)
        return done

    def sweep(self) -> list[str]:
        """End the sessions whose lease is over, for what they last metered."""
        due = self.due()
        for row in due:
            self._finish(row, row.metered, "swept")
        return [row.sid for row in due]

    def due(self) -> list[Row]:
        """The sessions whose lease is over."""
        return [row for row in self.rows.values() if row.state == "H" and row.deadline <= self.now]

    def take(self, micros: int) -> None:
        """Another session of the account uses up credit."""
        taken = min(micros, self.available)
        self.available -= taken
        self.elsewhere += taken

    def grant(self, micros: int) -> None:
        """A top-up."""
        self.granted += micros
        self.available += micros

    # -- the scripts ---------------------------------------------------------------------------------------------------

    def _init(self, args: Args) -> Reply:
        return [b"OK", args["ep"].encode()]

    def _reserve(self, args: Args) -> Reply:
        row = self.rows.get(args["sid"])
        if row is not None:
            if row.state == "H":
                left = max(0, row.deadline - self.now)
                return [b"EXISTS", _n(row.held), _n(self.available), row.fence.encode(), _n(left)]
            code = b"TOMBSTONE" if row.state == "V" else b"FINISHED"
            return [code, _n(self.available), _n(self.held), b"0"]
        taken, lease = min(int(args["want"]), self.available), int(args["lease"])
        if taken < int(args["minimum"]):
            in_flight = taken + self.held >= int(args["minimum"])
            return [b"IN_FLIGHT" if in_flight else b"BALANCE", _n(taken), _n(self.held), b"1000"]
        self.available -= taken
        row = Row(args["sid"], "H", str(self.now), taken, deadline=self.now + lease)
        self.rows[row.sid] = row
        return [b"HELD", _n(taken), _n(self.available), row.fence.encode(), _n(lease)]

    def _progress(self, args: Args) -> Reply:
        row = self.rows.get(args["sid"])
        if row is None or row.state == "V":
            return [b"UNKNOWN"]
        if row.fence != args["fence"]:
            return [b"FENCED"]
        if row.state == "T":
            return [b"FINAL", _n(row.charged)]
        seq, metered = int(args["q"]), int(args["metered"])
        rises = seq > row.seq and metered >= row.metered
        if not rises and not (seq == row.seq and metered == row.metered):
            return [b"STALE", _n(row.held), _n(self.available)]
        more = min(max(0, int(args["want"]) - row.held), self.available)
        self.available -= more
        row.held += more
        row.seq, row.metered = seq, metered
        row.deadline = self.now + int(args["lease"])
        return [b"OK", _n(row.held), _n(self.available)]

    def _settle(self, args: Args) -> Reply:
        row = self.rows.get(args["sid"])
        if row is None or row.state == "V":
            return [b"UNKNOWN"]
        if row.fence != args["fence"]:
            return [b"FENCED"]
        if row.state == "T":
            return self._final(row)
        return self._finish(row, int(args["charge"]), args["outcome"])

    def _void(self, args: Args) -> Reply:
        row = self.rows.setdefault(args["sid"], Row(args["sid"], "V"))
        if row.state == "V":
            return [b"TOMBSTONE"]
        unknown = args["fence"] == "0" and row.state == "H" and row.seq == 0
        if row.fence != args["fence"] and not unknown:
            return [b"FENCED"]
        return self._final(row) if row.state == "T" else self._finish(row, 0, "void")

    def _correct(self, args: Args) -> Reply:
        row = self.rows.get(args["sid"])
        if row is None or row.state == "V":
            return [b"UNKNOWN"]
        if row.fence != args["fence"] or row.state != "T" or row.outcome != "swept":
            return [b"FENCED" if row.fence != args["fence"] else b"OPEN" if row.state != "T" else b"FINAL"]
        if row.corrected is None:
            due = int(args["charge"]) - row.charged - row.absorbed
            if due <= 0:
                return [b"LOWER"]
            if self.now - row.ended_ms > HOUR_MS:
                return [b"LATE"]
            paid = min(due, self.available)
            self.available -= paid
            row.due, row.charged, row.absorbed = int(args["charge"]), row.charged + paid, row.absorbed + due - paid
            self.journal.append(Entry(row.sid, "corrected", paid))
            row.corrected = paid, due - paid, len(self.journal)
            code = b"CORRECTED"
        else:
            code = b"EXISTS"
        charged, absorbed, entry = row.corrected
        return [code, _n(charged), _n(absorbed), _n(self.available), _n(entry)]

    def _finish(self, row: Row, charge: int, outcome: str) -> Reply:
        from_hold = min(charge, row.held)
        beyond = min(charge - from_hold, self.available)
        self.available += row.held - from_hold - beyond
        row.state, row.held, row.outcome, row.due = "T", 0, outcome, charge
        row.charged, row.absorbed = from_hold + beyond, charge - from_hold - beyond
        self.journal.append(Entry(row.sid, outcome, row.charged))
        row.entry, row.ended_ms = len(self.journal), self.now
        if outcome == "swept":
            row.swept_for = row.charged
        return [b"SETTLED", _n(row.charged), _n(row.absorbed), _n(self.available), _n(row.entry)]

    def _final(self, row: Row) -> Reply:
        outcome = row.outcome.encode()
        return [b"FINAL", _n(row.charged), _n(row.absorbed), _n(self.available), _n(row.entry), outcome]
