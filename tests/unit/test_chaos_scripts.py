"""The chaos run speaks to the ledger by hand: with the scripts that gateways load, though it may not import them."""

from __future__ import annotations

import pytest

from loadtests.chaos.scripts import script_of
from metering.scripts import NAMES, load


@pytest.mark.parametrize("name", NAMES)
def test_a_script_by_hand_is_the_one_that_gateways_load(name: str) -> None:
    theirs = load()[name]
    mine = script_of(name)
    assert (mine.text, mine.keys, mine.args) == (theirs.text, theirs.keys, theirs.args)
