"""Refresh tokens on a real Postgres: one rotation each, a replay ends the login, nothing slips past a revocation."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from accounts import refresh_tokens
from accounts.refresh_tokens import FAMILIES_MAX, FAMILY_S, IDLE_S, Refresh, RefreshRefused, RefreshReplayed, rotate
from accounts.user_rows import find_user
from tests.support.users import HOME, NOW, RIGHT, WRONG, Identity, identity_fixture

__all__ = ["identity_fixture"]
MINUTE = timedelta(minutes=1)


async def refused(identity: Identity, text: str) -> bool:
    try:
        await rotate(identity.pool, text, now=NOW + MINUTE)
    except RefreshReplayed:
        return False
    except RefreshRefused:
        return True
    return False


async def login(identity: Identity) -> Refresh:
    user = await identity.users.authenticate("ada@example.com", RIGHT, ip=HOME, now=NOW)
    return await refresh_tokens.issue(identity.pool, user, now=NOW)


async def test_a_refresh_token_gives_the_next_one_and_only_its_hash_is_stored(identity: Identity) -> None:
    ada = await identity.ada()
    first = await login(identity)
    second = await rotate(identity.pool, first.text, now=NOW + MINUTE)
    assert (second.user, second.family_id) == (ada, first.family_id)
    assert second.text != first.text
    assert second.text not in repr(second)
    third = await rotate(identity.pool, second.text, now=NOW + 2 * MINUTE)
    dump = str(await identity.pool.fetch("SELECT * FROM refresh_token"))
    assert not any(token.text[-43:] in dump for token in (first, second, third))


async def test_a_replay_revokes_the_family_and_no_other_login(identity: Identity) -> None:
    await identity.ada()
    stolen, other = await login(identity), await login(identity)
    successor = await rotate(identity.pool, stolen.text, now=NOW)
    with pytest.raises(RefreshReplayed):
        await rotate(identity.pool, stolen.text, now=NOW + timedelta(milliseconds=1))
    assert await refused(identity, successor.text)
    assert (await rotate(identity.pool, other.text, now=NOW)).user == other.user


async def test_of_rotations_at_once_one_wins_and_the_others_revoke_what_it_got(identity: Identity) -> None:
    await identity.ada()
    for _ in range(10):
        first = await login(identity)
        answers = await asyncio.gather(
            *(rotate(identity.pool, first.text, now=NOW) for _ in range(6)), return_exceptions=True
        )
        winners = [answer for answer in answers if isinstance(answer, Refresh)]
        assert len(winners) == 1
        assert sum(isinstance(answer, RefreshReplayed) for answer in answers) == 5
        assert await refused(identity, winners[0].text)


async def test_a_rotation_at_the_moment_of_a_replay_leaves_nothing_usable(identity: Identity) -> None:
    await identity.ada()
    for _ in range(10):
        first = await login(identity)
        second = await rotate(identity.pool, first.text, now=NOW)
        replay, late = await asyncio.gather(
            rotate(identity.pool, first.text, now=NOW), rotate(identity.pool, second.text, now=NOW),
            return_exceptions=True,
        )  # fmt: skip
        assert isinstance(replay, RefreshReplayed)
        assert not isinstance(late, Refresh) or await refused(identity, late.text)
    open_ones = "SELECT count(*) FROM refresh_token WHERE used_at IS NULL AND revoked_at IS NULL"
    assert await identity.pool.fetchval(open_ones) == 0


async def test_unknown_expired_and_revoked_ones_get_the_same_answer(identity: Identity) -> None:
    await identity.ada()
    told = set()
    gone, ended, replayed = await login(identity), await login(identity), await login(identity)
    await refresh_tokens.logout(identity.pool, ended.text, now=NOW)
    await rotate(identity.pool, replayed.text, now=NOW)
    garbage = ["", "x", f"tg_refresh_{'a' * 43}", f"{gone.text}\n", f"{gone.text} ", "'; DROP TABLE user_; --", "a\0b"]
    for text, at in [
        *((each, NOW) for each in garbage),
        (gone.text, gone.expires_at),
        (ended.text, NOW),
        (replayed.text, NOW),
    ]:
        with pytest.raises(RefreshRefused) as refusal:
            await rotate(identity.pool, text, now=at)
        told.add(str(refusal.value))
    assert len(told) == 1
    assert (await rotate(identity.pool, gone.text, now=gone.expires_at - timedelta(microseconds=1))).user


async def test_a_login_ends_in_time_however_often_it_is_refreshed(identity: Identity) -> None:
    await identity.ada()
    token = await login(identity)
    for _ in range(FAMILY_S // IDLE_S):
        now = token.expires_at - MINUTE
        token = await rotate(identity.pool, token.text, now=now)
    assert token.expires_at == NOW + timedelta(seconds=FAMILY_S)
    with pytest.raises(RefreshRefused):
        await rotate(identity.pool, token.text, now=token.expires_at)


async def test_logging_out_ends_one_login_and_everywhere_ends_all(identity: Identity) -> None:
    ada = await identity.ada()
    here, there = await login(identity), await login(identity)
    older, here = here, await rotate(identity.pool, here.text, now=NOW)
    assert await refresh_tokens.logout(identity.pool, older.text, now=NOW), "a used one names its login too"
    assert not await refresh_tokens.logout(identity.pool, here.text, now=NOW)
    assert not await refresh_tokens.logout(identity.pool, "nothing", now=NOW)
    assert await refused(identity, here.text)
    there = await rotate(identity.pool, there.text, now=NOW)
    assert await refresh_tokens.logout_everywhere(identity.pool, ada.id, now=NOW)
    assert await refused(identity, there.text)
    after = await find_user(identity.pool, ada.id)
    assert after is not None
    assert after.token_version == ada.token_version + 1
    assert not await refresh_tokens.logout_everywhere(identity.pool, "a\0b", now=NOW)


async def test_a_changed_password_ends_logins_also_those_just_being_made(identity: Identity) -> None:
    ada = await identity.ada()
    before, newest = await login(identity), await login(identity)
    changed, late, rotated = await asyncio.gather(
        identity.users.change_password(ada.id, RIGHT, WRONG, ip=HOME, now=NOW),
        refresh_tokens.issue(identity.pool, ada, now=NOW), rotate(identity.pool, newest.text, now=NOW),
        return_exceptions=True,
    )  # fmt: skip
    assert not isinstance(changed, BaseException)
    for token in (before, late, rotated):
        assert not isinstance(token, Refresh) or await refused(identity, token.text)
    with pytest.raises(RefreshRefused):
        await refresh_tokens.issue(identity.pool, ada, now=NOW)  # who was authenticated with the old password


async def test_a_disabled_user_refreshes_nothing(identity: Identity) -> None:
    ada = await identity.ada()
    token = await login(identity)
    assert await identity.users.disable(ada.id, now=NOW)
    assert await refused(identity, token.text)
    assert await identity.users.enable(ada.id)
    assert await refused(identity, token.text), "being enabled again revives no login"


async def test_logins_of_a_user_are_bounded_and_the_oldest_goes(identity: Identity) -> None:
    ada = await identity.ada()
    made = [
        await refresh_tokens.issue(identity.pool, ada, now=NOW + timedelta(seconds=second))
        for second in range(FAMILIES_MAX + 1)
    ]
    assert await refused(identity, made[0].text)
    assert (await rotate(identity.pool, made[1].text, now=NOW + MINUTE)).user == ada


async def test_a_purge_removes_what_expired_and_nothing_that_would_show_a_replay(identity: Identity) -> None:
    await identity.ada()
    first = await login(identity)
    await rotate(identity.pool, first.text, now=NOW + MINUTE)
    assert await refresh_tokens.purge(identity.pool, now=NOW + 2 * MINUTE) == 0
    assert await refresh_tokens.purge(identity.pool, now=first.expires_at) == 1
    assert await identity.pool.fetchval("SELECT count(*) FROM refresh_token") == 1
