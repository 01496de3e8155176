"""`python -m tests.support.lua_model_runs`: many random histories of the ledger's scripts, and what they reached.

`--examples` histories (MODEL_EXAMPLES, 2,000) of at most 50 steps, from `--seed` on (SEED, a random one, which is
printed). `--mutant NAME`, or `all`, runs them against mutated scripts instead and says which were found. Fails when a
history differs from the model, with the shortest one that does. Must not: know a rule of the ledger.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from metering import scripts
from metering.ledger import LedgerError
from metering.scripts import Script
from storage.redis_client import RedisClient, RedisError
from tests.support.lua_model_machine import LedgerMachine
from tests.support.lua_model_rules import Rig
from tests.support.mutants import mutate
from tests.support.mutants_changes import MUTANTS
from tests.support.redis_server import RedisServer
from tests.support.valkey import TEST_CLOCK, valkey

STEPS = 50
BATCH = 9
WRONG = (AssertionError, LookupError, TypeError, ValueError, RedisError, LedgerError, ExceptionGroup)


@contextmanager
def rig(server: RedisServer, loaded: dict[str, Script] | None = None) -> Iterator[Rig]:
    """A loop and a client for histories on this server, which they empty."""
    with asyncio.Runner() as runner:
        client = RedisClient(server.url, call_ms=5_000, connect_ms=2_000, pending_max=50_000)
        runner.run(client.start())
        try:
            yield Rig(runner, client, loaded or scripts.load(TEST_CLOCK))
        finally:
            runner.run(client.aclose())


def histories(on: Rig, examples: int, first: int, *, shrink: bool = True) -> Counter[str]:
    """Run them, from the seed `first` on; how often each answer was seen. Raises what the first that differs raises.

    Few from each seed: after its first ten, Hypothesis makes most histories by changing a little of an earlier one."""
    LedgerMachine.rig = on
    chosen = settings(
        max_examples=BATCH,
        stateful_step_count=STEPS,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        deadline=None,
        derandomize=False,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    for number in range(first, first + -(-examples // BATCH)):
        try:
            run_state_machine_as_test(seed(number)(LedgerMachine), settings=chosen)
        except WRONG as error:
            error.add_note(f"seed {number}")
            raise
    return on.reached


def hunt(server: RedisServer, name: str, examples: int, first: int) -> str:
    """What a history said against the mutant; '' when none found it."""
    (mutant,) = (one for one in MUTANTS if one.name == name)
    with rig(server, mutate(scripts.load(TEST_CLOCK), mutant)) as on:
        try:
            histories(on, examples, first, shrink=False)
        except WRONG as error:
            return f"{type(error).__name__} {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.lua_model_runs")
    parser.add_argument("--examples", type=int, default=int(os.environ.get("MODEL_EXAMPLES") or 2_000))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED") or random.randrange(10**9)))
    parser.add_argument("--mutant", action="append", default=[])
    asked = parser.parse_args()
    begun = time.monotonic()
    with valkey() as server:
        if asked.mutant:
            names = [one.name for one in MUTANTS] if asked.mutant == ["all"] else asked.mutant
            for name in names:
                print(f"{name:42} {hunt(server, name, asked.examples, asked.seed) or 'LIVES'}", flush=True)
            return 0
        print(f"seed {asked.seed}: {asked.examples} histories of at most {STEPS} steps", flush=True)
        with rig(server) as on:
            reached = histories(on, asked.examples, asked.seed)
    for kind, count in sorted(reached.items()):
        print(f"{count:8,} {kind}")
    print(f"all agree with the model: {time.monotonic() - begun:.0f} s, {sum(reached.values()):,} answers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
