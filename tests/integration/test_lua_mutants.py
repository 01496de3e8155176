"""Every hand-made mutant of the scripts dies by a deterministic scenario, and every scenario passes on the real ones.

`-s` prints which scenario kills which mutant. One server serves all; each run begins with an empty shard.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest

from metering import scripts
from metering.ledger import LedgerError
from metering.scripts import Script
from storage.redis_client import RedisClient, RedisError
from tests.support.lua_scenarios_all import SCENARIOS, fresh
from tests.support.mutants import Mutant, mutate, occurrences
from tests.support.mutants_changes import MUTANTS
from tests.support.redis_server import RedisServer
from tests.support.valkey import TEST_CLOCK

LEAST = 150
WRONG = (AssertionError, LookupError, TypeError, ValueError, RedisError, LedgerError)
"""What a scenario raises on a wrong ledger: a figure, a shape of answer, an error where there should be none."""
CRASH = re.compile(r"(?<!@)user_script:\d+:")
"""How the server names an error of Lua itself; errors that a script raises on purpose read otherwise."""


class Invalid(Exception):
    """A mutant that is no Lua, or that Lua itself stops: its death would prove nothing."""


@pytest.fixture
async def client(server: RedisServer) -> AsyncIterator[RedisClient]:
    connected = RedisClient(server.url, call_ms=5_000, connect_ms=2_000, pending_max=50_000)
    await connected.start()
    try:
        yield connected
    finally:
        await connected.aclose()


async def fails(client: RedisClient, loaded: dict[str, Script], name: str) -> str | None:
    """What the scenario says against these scripts; None when it passes."""
    stand = await fresh(client, loaded)
    try:
        await SCENARIOS[name](stand)
    except WRONG as error:
        if CRASH.search(str(error)):
            raise Invalid(str(error)) from error
        return f"{type(error).__name__} {error}"
    return None


async def compiles(client: RedisClient, script: Script) -> None:
    """Raises Invalid for a mutant that is no Lua."""
    try:
        await client.call("SCRIPT", "LOAD", script.text)
    except RedisError as error:
        raise Invalid(str(error)) from error


async def killer_of(client: RedisClient, mutant: Mutant, real: dict[str, Script]) -> str | None:
    """The first scenario that the mutant fails: the one it names, then all others. None for a survivor."""
    loaded = mutate(real, mutant)
    for name, script in loaded.items():
        if script is not real[name]:
            await compiles(client, script)
    for name in sorted(SCENARIOS, key=lambda name: name != mutant.killer):
        if await fails(client, loaded, name) is not None:
            return name
    return None


@pytest.mark.parametrize("name", SCENARIOS)
async def test_the_scenario_passes_on_the_real_scripts(client: RedisClient, name: str) -> None:
    await SCENARIOS[name](await fresh(client, scripts.load(TEST_CLOCK)))


def test_each_mutants_text_stands_once_in_its_script() -> None:
    wrong = {mutant.name: (mutant.file, occurrences(mutant)) for mutant in MUTANTS if occurrences(mutant) != 1}
    assert wrong == {}, "a script was changed and the list of mutants was not"


async def test_every_mutant_dies(client: RedisClient) -> None:
    real = scripts.load(TEST_CLOCK)
    deaths: dict[str, str | None] = {}
    invalid: dict[str, str] = {}
    for mutant in MUTANTS:
        try:
            deaths[mutant.name] = await killer_of(client, mutant, real)
        except Invalid as error:
            invalid[mutant.name] = str(error)
        print(f"{mutant.file:14} {mutant.name:38} {deaths.get(mutant.name) or 'LIVES'}  ({mutant.breaks})")
    assert invalid == {}
    assert [name for name, killer in deaths.items() if killer is None] == []
    stale = {mutant.name: deaths[mutant.name] for mutant in MUTANTS if deaths[mutant.name] != mutant.killer}
    assert stale == {}, "these mutants name a scenario that does not kill them; the one that does is given here"


def test_the_list_is_long_enough_and_names_each_mutant_once() -> None:
    assert len(MUTANTS) >= LEAST
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert {mutant.killer for mutant in MUTANTS} <= SCENARIOS.keys()
    assert {mutant.file for mutant in MUTANTS} >= {f"{name}.lua" for name in scripts.NAMES}
