"""Users on a real Postgres: one answer to every guess, lock-out, changes and resets of passwords, and their races."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import asyncpg  # type: ignore[import-untyped]
import pytest

from accounts import admin
from accounts.login_failures import LockedOut, LockOut, LoginFailures, network_of
from accounts.passwords import Cost, InvalidPassword, Passwords, PasswordsBusy
from accounts.user_rows import InvalidEmail, InvalidUsername, User, email_of, find_user, username_of
from accounts.users import RESET_PAUSE_S, EmailTaken, LoginRefused, ResetRefused, Users
from tests.support.users import EMAIL, HOME, NOW, QUICK, RIGHT, WRONG, Identity, identity_fixture

__all__ = ["identity_fixture"]
INJECTIONS = ["' OR '1'='1", "'; DROP TABLE user_; --", 'x" OR ""="', "$1", "a\0b", "\ud800", "%", "ada@example.com'--"]
IMPOSSIBLE = [
    "role = 'root'",
    "email = 'ADA@example.com'",
    "email = NULL",
    "password_hash = 'plain text'",
    "username = ''",
    "issuer = 'x'",
    "company_role = 'owner'",
    "company_id = 'co_1', company_role = 'owner'",
    "account_id = 'acct_2'",
    "company_id = 'co_2', company_role = 'member'",
    "email = '\u0430da@example.com'",
]
LATER = NOW + timedelta(seconds=RESET_PAUSE_S)
NEW = "another good password"


async def answer(users: Users, email: str, password: str, ip: str = HOME) -> str:
    """What a caller is told."""
    try:
        return (await users.authenticate(email, password, ip=ip, now=NOW)).id
    except admin.AccountsError as error:
        return f"{type(error).__name__}: {error}"


async def test_who_registers_is_a_user_with_an_account_and_nothing_more(identity: Identity) -> None:
    ada = await identity.users.register("  Ada@Example.COM ", " Ada ", RIGHT, now=NOW)
    assert (ada.email, ada.username, ada.role, ada.company_id, ada.token_version) == (EMAIL, "Ada", "user", None, 0)
    assert (await admin.find_account(identity.pool, ada.account_id)).name == EMAIL
    for known_as in (ada.id, EMAIL, "ADA@example.com"):
        assert await find_user(identity.pool, known_as) == ada
    for unknown in ("", "eve@example.com", "ad\u0430@example.com", ada.id.upper(), *INJECTIONS):
        assert await find_user(identity.pool, unknown) is None
    dump = str(await identity.pool.fetch("SELECT * FROM user_"))
    assert "$argon2id$" in dump
    assert RIGHT not in dump


async def test_an_address_is_taken_once_in_every_spelling_and_leaves_no_account_behind(identity: Identity) -> None:
    spellings = [
        "ada@example.com",
        "ADA@EXAMPLE.COM",
        "\uff41da\uff20example.com",
        "Ada@example.com",
        "\u212bda@example.com",
    ]
    answers = await asyncio.gather(
        *(identity.users.register(each, "Ada", RIGHT, now=NOW) for each in spellings[:4]), return_exceptions=True
    )
    assert sorted(type(each).__name__ for each in answers) == ["EmailTaken", "EmailTaken", "EmailTaken", "User"]
    assert await identity.pool.fetchval("SELECT count(*) FROM account") == 1
    with pytest.raises(InvalidEmail):
        await identity.users.register(spellings[4], "Ada", RIGHT, now=NOW)
    with pytest.raises(EmailTaken):
        await identity.users.register(EMAIL, "Eve", RIGHT, now=NOW)


@pytest.mark.parametrize(
    "email",
    ["", "ada", "@example.com", "ada@", "a@b@c.d", "ada@-x.com", "ada@x..com", "\u0430da@example.com", "ad\u0131@x.com",
     "stra\u00dfe@x.com", "ada@ex\u0430mple.com", "a b@x.com", "ada@x.com\n", "ada@x.com\0", "\ud800@x.com",
     "x" * 65 + "@x.com", "a@" + "x" * 300, "ﷺ" * 100 + "@x.com", '"a b"@x.com', "ada\u200b@x.com"],
)  # fmt: skip
def test_what_only_looks_like_an_address_is_none(email: str) -> None:
    with pytest.raises(InvalidEmail):
        email_of(email)


def test_usernames_are_text_to_show() -> None:
    assert username_of(" Zoe\u0308 O'Hara 李 ") == "Zo\u00eb O'Hara 李"
    for name in ("", "  ", "a\nb", "a\0b", "x" * 65, "\u202eevil", "\ud800", "x" * 1_000_000):
        with pytest.raises(InvalidUsername):
            username_of(name)


async def test_bad_input_registers_nobody(identity: Identity) -> None:
    for email, name, password, error in [
        ("ada", "Ada", RIGHT, InvalidEmail),
        (EMAIL, "", RIGHT, InvalidUsername),
        (EMAIL, "Ada", "short", InvalidPassword),
    ]:
        with pytest.raises(error):
            await identity.users.register(email, name, password, now=NOW)
    assert await identity.pool.fetchval("SELECT count(*) FROM account") == 0


async def test_every_failed_login_has_one_answer_and_one_argon2_run(identity: Identity) -> None:
    users, ada = identity.with_rules(LockOut(pair_max=100)), await identity.ada()
    gone = await users.register("gone@example.com", "Gone", RIGHT, now=NOW)
    guest = await users.register("guest@example.com", "Guest", RIGHT, now=NOW)
    await users.disable(gone.id, now=NOW)
    await identity.pool.execute("UPDATE user_ SET password_hash = NULL WHERE id = $1", guest.id)
    tries = [(EMAIL, WRONG), (EMAIL, ""), (EMAIL, "x" * 5_000), ("nobody@example.com", RIGHT), ("no address", RIGHT)]
    tries += [("gone@example.com", RIGHT), ("gone@example.com", WRONG), ("guest@example.com", RIGHT)]
    tries += [(text, RIGHT) for text in INJECTIONS] + [(EMAIL, text) for text in INJECTIONS]
    told = set()
    for email, password in tries:
        before = identity.passwords.runs
        told.add(await answer(users, email, password))
        assert identity.passwords.runs == before + 1, (email, password)
    assert told == {"LoginRefused: Email address or password is wrong."}
    before = identity.passwords.runs
    assert await answer(users, " ADA@example.com", RIGHT) == ada.id
    assert identity.passwords.runs == before + 1


async def test_a_hash_of_another_cost_is_replaced_at_the_next_login(identity: Identity) -> None:
    await identity.ada()
    dearer = Passwords(Cost(memory_kib=128, passes=1))
    users = Users(identity.pool, dearer, LoginFailures(identity.pool))
    ada = await users.authenticate(EMAIL, RIGHT, ip=HOME, now=NOW)
    stored = await identity.pool.fetchval("SELECT password_hash FROM user_ WHERE id = $1", ada.id)
    assert "m=128,t=1" in stored
    assert await answer(users, EMAIL, RIGHT) == ada.id
    dearer.close()


async def test_guessing_locks_known_and_unknown_addresses_alike_and_only_from_there(identity: Identity) -> None:
    ada = await identity.ada()
    for email in (EMAIL, "nobody@example.com"):
        assert {await answer(identity.users, email, WRONG) for _ in range(5)} == {
            "LoginRefused: Email address or password is wrong."
        }
        before = identity.passwords.runs
        with pytest.raises(LockedOut) as locked:
            await identity.users.authenticate(email, RIGHT, ip=HOME, now=NOW)
        assert (locked.value.retry_after_s, identity.passwords.runs) == (900, before)
    assert await answer(identity.users, EMAIL, RIGHT, "198.51.100.1") == ada.id
    assert (await answer(identity.users, EMAIL, RIGHT)).startswith("LockedOut")
    assert await identity.users.authenticate(EMAIL, RIGHT, ip=HOME, now=NOW + timedelta(seconds=900))


async def test_a_hundred_guesses_at_once_are_five_guesses(identity: Identity) -> None:
    await identity.ada()
    before = identity.passwords.runs
    told = await asyncio.gather(*(answer(identity.users, EMAIL, WRONG) for _ in range(100)))
    assert identity.passwords.runs == before + 5
    assert sum(each.startswith("LoginRefused") for each in told) == 5
    assert sum(each.startswith("LockedOut") for each in told) == 95


async def test_a_right_password_forgets_what_was_mistyped_from_there(identity: Identity) -> None:
    users, ada = identity.with_rules(LockOut(pair_max=3)), await identity.ada()
    for password in (WRONG, WRONG, RIGHT, WRONG, WRONG, RIGHT):
        assert (await answer(users, EMAIL, password) == ada.id) is (password == RIGHT)


async def test_a_right_password_from_elsewhere_does_not_forget_what_others_failed(identity: Identity) -> None:
    users, ada = identity.with_rules(LockOut(pair_max=4, email_max=5)), await identity.ada()
    for _ in range(3):  # twice wrong, once right: never locked
        await answer(users, EMAIL, WRONG, "198.51.100.1")
        assert await answer(users, EMAIL, RIGHT) == ada.id
    await answer(users, EMAIL, WRONG)
    await answer(users, EMAIL, WRONG)
    assert (await answer(users, EMAIL, RIGHT, "198.51.100.2")).startswith("LockedOut"), "five failures of one email"


async def test_one_network_cannot_try_one_password_on_everybody(identity: Identity) -> None:
    users, ada = identity.with_rules(LockOut(network_max=4)), await identity.ada()
    mine = "2001:db8:1:2::"
    for number in range(2):
        await answer(users, f"user{number}@example.com", WRONG, f"{mine}{number}")
    for _ in range(2):
        assert await answer(users, EMAIL, RIGHT, f"{mine}9") == ada.id, "a right password is no failure"
    for number in range(2, 4):
        await answer(users, f"user{number}@example.com", WRONG, f"{mine}{number}")
    assert (await answer(users, EMAIL, RIGHT, f"{mine}ffff")).startswith("LockedOut")
    assert await answer(users, EMAIL, RIGHT, "2001:db8:1:3::1") == ada.id


def test_networks_of_addresses() -> None:
    assert network_of("::ffff:192.0.2.7") == network_of("192.0.2.7") == "192.0.2.7"
    assert network_of("2001:db8:1:2:3::4") == "2001:db8:1:2::/64"
    with pytest.raises(ValueError, match="does not appear"):
        network_of("localhost")


async def test_the_counters_are_bounded_and_swept(identity: Identity) -> None:
    users = identity.with_rules(LockOut(rows_max=20, sweep_every=10, network_max=1_000))
    for number in range(60):
        await answer(users, f"user{number}@example.com", WRONG)
    rows = "SELECT count(*) FROM login_failure"
    assert await identity.pool.fetchval(rows) <= 20 + 3 * 10
    await LoginFailures(identity.pool).sweep(NOW + timedelta(hours=1))
    assert await identity.pool.fetchval(rows) == 0


async def test_an_attempt_that_found_argon2_busy_counts_for_nothing(identity: Identity) -> None:
    await identity.ada()
    full = Passwords(QUICK, threads=1, waiting_max=-1)
    users = Users(identity.pool, full, LoginFailures(identity.pool))
    for _ in range(20):
        with pytest.raises(PasswordsBusy):
            await users.authenticate(EMAIL, RIGHT, ip=HOME, now=NOW)
    full.close()


async def test_a_changed_password_is_the_only_one(identity: Identity) -> None:
    ada = await identity.ada()
    changed = await identity.users.change_password(ada.id, RIGHT, NEW, ip=HOME, now=NOW)
    assert changed.token_version == ada.token_version + 1
    assert (await answer(identity.users, EMAIL, RIGHT)).startswith("LoginRefused")
    assert await answer(identity.users, EMAIL, NEW) == ada.id


async def test_a_password_is_changed_only_by_who_knows_it_and_guesses_count(identity: Identity) -> None:
    ada = await identity.ada()
    with pytest.raises(InvalidPassword):
        await identity.users.change_password(ada.id, RIGHT, "short", ip=HOME, now=NOW)
    for nobody in ("user_nobody", *INJECTIONS):
        with pytest.raises(LoginRefused):
            await identity.users.change_password(nobody, RIGHT, NEW, ip=HOME, now=NOW)
    for _ in range(5):
        with pytest.raises(LoginRefused):
            await identity.users.change_password(ada.id, WRONG, NEW, ip=HOME, now=NOW)
    with pytest.raises(LockedOut):
        await identity.users.change_password(ada.id, RIGHT, NEW, ip=HOME, now=NOW)
    assert (await answer(identity.users, EMAIL, RIGHT)).startswith("LockedOut"), "one count for both ways"


async def test_of_changes_at_once_one_is_made(identity: Identity) -> None:
    ada = await identity.ada()
    news = [f"new password {number}" for number in range(4)]
    answers = await asyncio.gather(
        *(identity.users.change_password(ada.id, RIGHT, new, ip=HOME, now=NOW) for new in news), return_exceptions=True
    )
    made = [new for new, each in zip(news, answers, strict=True) if isinstance(each, User)]
    assert len(made) == 1
    assert all(isinstance(each, User | LoginRefused) for each in answers)
    assert await answer(identity.users, EMAIL, made[0]) == ada.id


async def test_a_reset_works_once_and_goes_to_the_address_on_record(identity: Identity) -> None:
    ada = await identity.ada()
    reset = await identity.users.start_reset("\uff21DA@example.com", now=NOW)
    assert reset is not None
    assert reset.email == EMAIL
    assert reset.text not in repr(reset)
    assert reset.text[-43:] not in str(await identity.pool.fetch("SELECT * FROM password_reset"))
    answers = await asyncio.gather(
        *(identity.users.finish_reset(reset.text, NEW, now=NOW) for _ in range(4)), return_exceptions=True
    )
    assert sorted(type(each).__name__ for each in answers) == ["ResetRefused"] * 3 + ["User"]
    assert await answer(identity.users, EMAIL, NEW) == ada.id
    after = await find_user(identity.pool, ada.id)
    assert after is not None
    assert after.token_version == 1


async def test_resets_that_are_old_replaced_invented_or_of_the_disabled_are_refused(identity: Identity) -> None:
    ada = await identity.ada()
    first = await identity.users.start_reset(EMAIL, now=NOW)
    assert await identity.users.start_reset(EMAIL, now=LATER - timedelta(seconds=1)) is None, "asked too soon"
    second = await identity.users.start_reset(EMAIL, now=LATER)
    assert first is not None
    assert second is not None
    before = identity.passwords.runs
    for text, at in [(first.text, LATER), (second.text, second.expires_at), (f"tg_reset_{'a' * 43}", LATER),
                     (f"{second.text}\n", LATER), *((text, LATER) for text in INJECTIONS)]:  # fmt: skip
        with pytest.raises(ResetRefused):
            await identity.users.finish_reset(text, NEW, now=at)
    assert identity.passwords.runs == before
    with pytest.raises(InvalidPassword):
        await identity.users.finish_reset(second.text, "short", now=LATER)
    await identity.users.disable(ada.id, now=LATER)
    with pytest.raises(ResetRefused):
        await identity.users.finish_reset(second.text, NEW, now=LATER)
    for nobody in (EMAIL, "nobody@example.com", "\u0430da@example.com", *INJECTIONS):
        assert await identity.users.start_reset(nobody, now=LATER + timedelta(hours=1)) is None


async def test_a_changed_password_ends_an_open_reset(identity: Identity) -> None:
    ada = await identity.ada()
    reset = await identity.users.start_reset(EMAIL, now=NOW)
    assert reset is not None
    await identity.users.change_password(ada.id, RIGHT, NEW, ip=HOME, now=NOW)
    with pytest.raises(ResetRefused):
        await identity.users.finish_reset(reset.text, RIGHT, now=NOW)


async def test_postgres_refuses_what_no_user_can_be(identity: Identity) -> None:
    await identity.ada()
    await identity.pool.execute("INSERT INTO account (id, name, shard) VALUES ('acct_3', 'Acme', 1)")
    await identity.pool.execute("INSERT INTO company (id, name, account_id) VALUES ('co_2', 'Acme', 'acct_3')")
    for change in IMPOSSIBLE:
        with pytest.raises(asyncpg.IntegrityConstraintViolationError):
            await identity.pool.execute(f"UPDATE user_ SET {change}")


async def test_members_share_their_company_s_account_and_others_share_none(identity: Identity) -> None:
    ada = await identity.ada()
    eve = await identity.users.register("eve@example.com", "Eve", RIGHT, now=NOW)
    with pytest.raises(asyncpg.UniqueViolationError):
        await identity.pool.execute("UPDATE user_ SET account_id = $2 WHERE id = $1", eve.id, ada.account_id)
    await identity.pool.execute("INSERT INTO account (id, name, shard) VALUES ('acct_3', 'Acme', 1)")
    await identity.pool.execute("INSERT INTO company (id, name, account_id) VALUES ('co_2', 'Acme', 'acct_3')")
    await identity.pool.execute("UPDATE user_ SET company_id = 'co_2', company_role = 'member', account_id = 'acct_3'")
    member = await find_user(identity.pool, eve.id)
    assert member is not None
    assert (member.company_id, member.company_role, member.account_id) == ("co_2", "member", "acct_3")
