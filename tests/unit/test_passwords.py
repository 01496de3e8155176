"""Passwords: bounds, the dummy, the line in front of argon2, and that the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from accounts.passwords import BYTES_MAX, Cost, InvalidPassword, Passwords, PasswordsBusy, checked

QUICK = Cost(memory_kib=64, passes=1)
SLOW = Cost(memory_kib=65_536, passes=2)
RIGHT, WRONG = "correct horse battery", "Tr0ub4dor&3"


@pytest.fixture
def passwords() -> Iterator[Passwords]:
    made = Passwords(QUICK)
    yield made
    made.close()


async def test_a_password_is_verified_by_its_hash_and_no_other_password_is(passwords: Passwords) -> None:
    stored = await passwords.hash(RIGHT)
    assert stored.startswith("$argon2id$v=19$m=64,t=1,p=1$")
    assert RIGHT not in stored
    assert await passwords.verify(stored, RIGHT)
    assert not await passwords.verify(stored, WRONG)
    assert await passwords.hash(RIGHT) != stored, "every hash has its own salt"


async def test_the_default_cost_is_the_one_that_is_recommended() -> None:
    passwords = Passwords()
    assert (await passwords.hash(RIGHT)).startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    passwords.close()


async def test_nobody_is_verified_with_as_many_runs_as_somebody(passwords: Passwords) -> None:
    stored = await passwords.hash(RIGHT)
    for case in (stored, None, "", "damaged", "$argon2id$v=19$m=64,t=1,p=1$AAAA$AAAA"):
        for password in (WRONG, "", "short", "x" * 5_000, "\ud800 half a pair", RIGHT):
            before = passwords.runs
            assert await passwords.verify(case, password) is (case == stored and password == RIGHT)
            assert passwords.runs == before + 1


@pytest.mark.parametrize("text", ["", "7 bytes", "x" * 1_025, "é" * 513, "ﷺ" * 60, "a half pair \ud800"])
def test_what_is_too_short_too_long_or_no_text_is_no_password(text: str) -> None:
    with pytest.raises(InvalidPassword):
        checked(text)


@pytest.mark.parametrize("text", ["8 bytes.", "x" * BYTES_MAX, "é" * 512, "日本語", "with\0NUL and 'quotes'"])
async def test_the_bounds_themselves_are_passwords(passwords: Passwords, text: str) -> None:
    assert await passwords.verify(await passwords.hash(text), text)


async def test_one_keyboard_s_accent_is_another_s(passwords: Passwords) -> None:
    assert await passwords.verify(await passwords.hash("caf\u00e9 au lait"), "cafe\u0301 au lait")


async def test_every_byte_of_a_long_password_counts(passwords: Passwords) -> None:
    stored = await passwords.hash("x" * (BYTES_MAX - 1) + "a")
    assert not await passwords.verify(stored, "x" * (BYTES_MAX - 1) + "b")


async def test_a_hash_of_another_cost_is_verified_and_wants_to_be_made_anew(passwords: Passwords) -> None:
    dearer = Passwords(Cost(memory_kib=128, passes=2))
    stored = await dearer.hash(RIGHT)
    assert await passwords.verify(stored, RIGHT)
    assert passwords.needs_rehash(stored)
    assert not dearer.needs_rehash(stored)
    dearer.close()


async def test_the_event_loop_goes_on_while_argon2_runs() -> None:
    passwords = Passwords(SLOW, threads=1)
    running = asyncio.create_task(passwords.hash(RIGHT))
    turns = 0
    while not running.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 10
    assert any(thread.name.startswith("argon2") for thread in threading.enumerate())
    passwords.close()


async def test_a_full_line_refuses_and_a_caller_who_left_keeps_its_place_until_the_run_ends() -> None:
    passwords = Passwords(SLOW, threads=1, waiting_max=1)
    tasks = [asyncio.create_task(passwords.hash(RIGHT)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(PasswordsBusy):
        await passwords.verify(None, RIGHT)
    tasks[0].cancel()
    await asyncio.sleep(0)
    with pytest.raises(PasswordsBusy):
        await passwords.hash(RIGHT)
    await tasks[1]
    assert await passwords.verify(await passwords.hash(RIGHT), RIGHT)
    passwords.close()
