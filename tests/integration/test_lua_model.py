"""The real scripts against a small model: random histories with an injected clock, every invariant after every step.

The machine is tests/support/lua_model_machine.py; `make prove-model` runs many more histories, anew each time.
"""

from __future__ import annotations

import pytest

from metering import scripts
from tests.support.lua_model_runs import WRONG, histories, rig
from tests.support.mutants import mutate
from tests.support.mutants_changes import MUTANTS
from tests.support.redis_server import RedisServer
from tests.support.valkey import TEST_CLOCK

HISTORIES = 45
SEED = 1
ALWAYS = {
    "account: owes more than its limit", "correct: Corrected False", "expire: due", "grant: Granted True",
    "journal: grant rp", "journal: policy", "journal: settle ab", "journal: settle br", "journal: settle d",
    "journal: settle rp", "journal: settle vd", "progress: Progressed False", "progress: Progressed True",
    "reassert: HELD", "reserve: Held False", "reserve: Refused balance", "reserve: Refused blocked",
    "reserve: Refused debt", "reserve: Refused in_flight", "reserve: Refused parallel", "reserve: Refused requests",
    "reserve: Refused tombstone", "revoke: Voided True", "settle: Settled True", "sweep: due", "take: Voided True",
    "void: Settled False",
}  # fmt: skip
"""What the histories of this test, the same each time, are known to reach. After a change of the machine they are
others: where one of these is missing then, its rules need steering, or the test more histories."""


def test_random_histories_agree_with_the_model(server: RedisServer) -> None:
    with rig(server) as on:
        reached = histories(on, HISTORIES, SEED)
    assert {kind for kind in ALWAYS if not reached[kind]} == set()


@pytest.mark.parametrize("name", ["line_without_debt", "hold_forgets_other_holds", "policy_does_not_count"])
def test_a_wrong_rule_is_found(server: RedisServer, name: str) -> None:
    """Each mutant has its scenario; these show that the machine sees, too."""
    (mutant,) = (one for one in MUTANTS if one.name == name)
    with rig(server, mutate(scripts.load(TEST_CLOCK), mutant)) as on, pytest.raises(WRONG):
        histories(on, HISTORIES, SEED, shrink=False)
