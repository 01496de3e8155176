"""A worker's receipts: kept until Postgres has them, bounded, and alert to a Redis that goes back in time."""

from __future__ import annotations

from metering import receipts
from metering.ledger import AccountRef, SessionRef
from metering.receipts import OWED, SETTLED, Receipts

ACCOUNT = AccountRef("acc", 7)


def owe(kept: Receipts, name: str) -> None:
    kept.owed(SessionRef(name, ACCOUNT, "key", 5), 70, "completed", b"{}")


def test_an_owed_settlement_stays_whatever_the_journal_says() -> None:
    kept = Receipts()
    owe(kept, "s1")
    kept.prune({7: (9, 9_999)})
    (one,) = kept.all()
    assert (one.session, one.kind, one.charge) == ("s1", OWED, 70)


def test_an_acknowledged_one_says_what_was_charged_and_goes_once_it_has_arrived() -> None:
    kept = Receipts()
    owe(kept, "s1")
    kept.acknowledged("s1", 2, 41, 60, repeated=False)
    (one,) = kept.all()
    assert (one.kind, one.epoch, one.entry, one.charge) == (SETTLED, 2, 41, 60)
    for short in ({7: (2, 40)}, {8: (2, 99)}, {7: (3, 99)}):
        kept.prune(short)
        assert len(kept) == 1, short  # the cursor of a later epoch says nothing of a lost one
    kept.prune({7: (2, 41)})
    assert len(kept) == 0


def test_a_dropped_one_is_forgotten_and_what_was_never_owed_is_no_matter() -> None:
    kept = Receipts()
    owe(kept, "s1")
    kept.dropped("s1")
    kept.dropped("s1")
    kept.acknowledged("s1", 1, 1, 70, repeated=False)
    assert len(kept) == 0


def test_the_oldest_acknowledged_above_the_bound_go_first() -> None:
    kept = Receipts()
    for number in range(receipts.KEEP_MAX + 10):
        owe(kept, f"s{number}")
        kept.acknowledged(f"s{number}", 1, number + 1, 70, repeated=False)
    kept.prune({})
    names = [one.session for one in kept.all()]
    assert (len(names), names[0]) == (receipts.KEEP_MAX, "s10")


def test_a_number_that_does_not_rise_is_suspect_unless_it_is_a_repeat_or_a_new_epoch() -> None:
    suspects: list[tuple[int, int]] = []
    kept = Receipts("pv", lambda shard, epoch, reason: suspects.append((shard, epoch)))
    for name, epoch, entry, repeated in (
        ("a", 1, 5, False), ("b", 1, 6, False), ("c", 1, 2, True), ("d", 2, 1, False), ("e", 0, 1, False),
    ):  # fmt: skip
        owe(kept, name)
        kept.acknowledged(name, epoch, entry, 70, repeated=repeated)
    assert suspects == []
    for name, entry in (("f", 6), ("g", 3)):
        owe(kept, name)
        kept.acknowledged(name, 1, entry, 70, repeated=False)
    assert suspects == [(7, 1), (7, 1)]
