"""Signing keys in Postgres: sealed, made once, rotated with overlap, retired at once, and read again in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import jwt
import pytest

from accounts import signing_keys
from accounts.jws import TokenRefused, TokensUnavailable, UnknownTokenKey
from accounts.signing_keys import ANNOUNCE_S, KEYS_MAX, OUTLIVES_S, SigningKeys, ensure, read_ring, retire, rotate
from storage.database import Pool, connect_pool
from tests.support.tokens import AUDIENCE, HEADER, ISSUER, NOW, WHO, Clock, own_claims, signed, signing_key, tokens

SECRET, OTHER = b"s" * 32, b"t" * 32


@pytest.fixture(name="pool")
async def pool_fixture(ledger_database: str) -> AsyncIterator[Pool]:
    pool = await connect_pool(ledger_database)
    yield pool
    await pool.close()


def process(pool: Pool, clock: Clock, secret: bytes = SECRET) -> SigningKeys:
    """What one worker holds."""
    return SigningKeys(pool, secret, tokens(clock=clock))


def kid(text: str) -> str:
    name: str = jwt.get_unverified_header(text)["kid"]
    return name


async def test_processes_that_start_together_agree_on_one_first_key(pool: Pool) -> None:
    made = await asyncio.gather(*(ensure(pool, SECRET, NOW) for _ in range(6)))
    assert len([one for one in made if one is not None]) == 1
    first, second = process(pool, Clock()), process(pool, Clock())
    assert (await second.verify(await first.issue(WHO))).sub == WHO.id
    assert await first.document() == await second.document()


async def test_no_private_key_is_in_the_database_and_another_secret_opens_none(pool: Pool) -> None:
    await ensure(pool, SECRET, NOW)
    ring = await read_ring(pool, SECRET, NOW)
    signer = ring.signer(NOW)
    assert signer is not None
    number = signer.private.private_numbers().private_value.to_bytes(32, "big")
    (row,) = await pool.fetch("SELECT public, sealed FROM signing_key")
    assert number not in row["sealed"] + row["public"]
    assert (await read_ring(pool, OTHER, NOW)).signer(NOW) is None


async def test_a_row_that_somebody_put_or_changed_in_the_database_is_not_trusted(pool: Pool) -> None:
    await ensure(pool, OTHER, NOW)  # the only way to seal that an intruder has: with a secret of their own
    await ensure(pool, SECRET, NOW)
    keys = process(pool, Clock())
    good = await keys.issue(WHO)
    intruder = await process(pool, Clock(), OTHER).issue(WHO)
    assert await keys.verify(good)
    with pytest.raises(UnknownTokenKey):
        await keys.verify(intruder)
    await pool.execute("UPDATE signing_key SET kid = 'renamed' WHERE kid = $1", kid(good))
    assert (await read_ring(pool, SECRET, NOW)).document(NOW) == {"keys": []}


async def test_two_seals_of_one_secret_share_no_nonce(pool: Pool) -> None:
    for turn in range(4):
        await rotate(pool, SECRET, NOW + turn)
    rows = await pool.fetch("SELECT substr(sealed, 1, 12) AS nonce FROM signing_key")
    assert len({row["nonce"] for row in rows}) == 4


async def test_a_rotated_key_is_published_before_it_signs_and_the_old_one_outlives_its_tokens(pool: Pool) -> None:
    clock = Clock()
    await ensure(pool, SECRET, NOW)
    old = await process(pool, clock).issue(WHO)
    made = await rotate(pool, SECRET, NOW)
    assert made is not None
    assert made.signs_from == NOW + ANNOUNCE_S
    keys = process(pool, clock)
    assert {key["kid"] for key in (await keys.document())["keys"]} == {kid(old), made.kid}
    assert kid(await keys.issue(WHO)) == kid(old)

    clock.now = NOW + ANNOUNCE_S - 1
    last = await keys.issue(WHO)  # the old key's last token
    assert kid(last) == kid(old)
    clock.now = NOW + ANNOUNCE_S
    assert kid(await keys.issue(WHO)) == made.kid
    clock.now += 900 + 28
    assert await keys.verify(last)  # at the very end of its leeway
    clock.now = NOW + ANNOUNCE_S + OUTLIVES_S
    with pytest.raises(UnknownTokenKey):
        await keys.verify(last)


async def test_a_worker_that_never_heard_of_a_key_reads_the_keys_again(pool: Pool) -> None:
    await ensure(pool, SECRET, NOW)
    early, clock = process(pool, Clock()), Clock()
    assert await early.issue(WHO)  # has read the keys
    await rotate(pool, SECRET, NOW, announce_s=0)
    late = process(pool, clock)
    clock.now += 1
    text = await late.issue(WHO)
    many = await asyncio.gather(*(early.verify(text) for _ in range(20)))  # all wait for the one reading
    assert {claims.sub for claims in many} == {WHO.id}


async def test_invented_key_ids_cause_one_reading_and_then_none_for_a_while(pool: Pool) -> None:
    await ensure(pool, SECRET, NOW)
    keys = process(pool, Clock())
    assert await keys.issue(WHO)
    stranger = signing_key()
    for number in range(5):
        with pytest.raises(UnknownTokenKey):
            await keys.verify(signed({**HEADER, "kid": f"invented-{number}"}, own_claims(), stranger.private, "ES256"))
    late = Clock(NOW + 1)
    await rotate(pool, SECRET, NOW, announce_s=0)
    text = await process(pool, late).issue(WHO)
    with pytest.raises(UnknownTokenKey):  # rests after the invented ones: nothing was read since
        await keys.verify(text)


async def test_a_retired_key_ends_at_once_and_another_takes_its_place(pool: Pool) -> None:
    await ensure(pool, SECRET, NOW)
    text = await process(pool, Clock()).issue(WHO)
    assert await retire(pool, SECRET, kid(text), NOW)
    assert not await retire(pool, SECRET, kid(text), NOW)
    assert not await retire(pool, SECRET, "nobody's", NOW)
    keys = process(pool, Clock())
    with pytest.raises(TokenRefused):
        await keys.verify(text)
    assert kid(await keys.issue(WHO)) != kid(text)


async def test_a_worker_whose_keys_are_old_reads_them_before_it_accepts_a_retired_one(pool: Pool) -> None:
    await ensure(pool, SECRET, NOW)
    keys = SigningKeys(pool, SECRET, tokens(clock=Clock()), fresh_s=0)
    text = await keys.issue(WHO)
    assert await keys.verify(text)
    await retire(pool, SECRET, kid(text), NOW)
    with pytest.raises(TokenRefused):
        await keys.verify(text)


async def test_many_may_ask_for_a_rotation_and_one_happens(pool: Pool) -> None:
    await ensure(pool, SECRET, NOW)
    assert await rotate(pool, SECRET, NOW + 99, older_than_s=100) is None
    asked = [rotate(pool, SECRET, NOW + 100, older_than_s=100) for _ in range(5)]
    assert len([made for made in await asyncio.gather(*asked) if made is not None]) == 1


async def test_keys_cannot_be_rotated_without_bound_and_ended_ones_are_forgotten(pool: Pool) -> None:
    for turn in range(KEYS_MAX):
        assert await rotate(pool, SECRET, NOW + turn)
    with pytest.raises(signing_keys.TooManyKeys):
        await rotate(pool, SECRET, NOW + KEYS_MAX)
    assert await rotate(pool, SECRET, NOW + 3 * OUTLIVES_S)  # by now tokens of all but the last have ended
    await rotate(pool, SECRET, NOW + 2 * signing_keys.KEEP_S)
    assert await pool.fetchval("SELECT count(*) FROM signing_key") == 2


async def test_a_new_secret_starts_with_a_key_of_its_own(pool: Pool) -> None:
    await ensure(pool, SECRET, NOW)
    old = await process(pool, Clock()).issue(WHO)
    assert await ensure(pool, OTHER, NOW)
    keys = process(pool, Clock(), OTHER)
    assert await keys.verify(await keys.issue(WHO))
    with pytest.raises(UnknownTokenKey):
        await keys.verify(old)


async def test_without_postgres_known_keys_go_on_and_a_fresh_process_cannot_tell(ledger_database: str) -> None:
    pool = await connect_pool(ledger_database)
    await ensure(pool, SECRET, NOW)
    keys, fresh = process(pool, Clock()), process(pool, Clock())
    text = await keys.issue(WHO)
    await pool.close()
    assert await keys.verify(text)
    with pytest.raises(TokensUnavailable):
        await fresh.verify(text)
    invented = signed({**HEADER, "kid": "new"}, own_claims(), signing_key().private, "ES256")
    with pytest.raises(UnknownTokenKey):
        await keys.verify(invented)


async def test_the_names_of_other_deployments_are_no_reason_to_accept_a_token(pool: Pool) -> None:
    await ensure(pool, SECRET, NOW)
    keys = process(pool, Clock())
    text = await keys.issue(WHO)
    elsewhere = process(pool, Clock())
    elsewhere.tokens.issuer, elsewhere.tokens.audience = "https://other.example", AUDIENCE
    with pytest.raises(TokenRefused, match="iss"):
        await elsewhere.verify(text)
    elsewhere.tokens.issuer, elsewhere.tokens.audience = ISSUER, "other"
    with pytest.raises(TokenRefused, match="aud"):
        await elsewhere.verify(text)
