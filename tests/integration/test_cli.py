"""The command line on embedded stores: what it prints, what it changes, and with which code it ends."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from accounts import keys
from accounts.key_store import KeyStore
from gateway.cli import demo
from gateway.cli.app import root
from gateway.cli.context import Context, with_stores
from metering.journal import Flusher
from metering.keys import SHARDS
from metering.ledger import AccountRef, Held, HoldRequest, SessionRef
from tests.support.cli import Run

HEAVY = {"asyncpg", "sqlalchemy", "alembic", "hiredis", "redis", "msgspec", "rich", "litestar", "tiktoken", "httpx2"}


def on_stores(data_dir: Path, work: Callable[[Context], Awaitable[Any]]) -> Any:
    return with_stores(data_dir, "working", work)


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from leaves(child, (*path, name))
    else:
        yield path, command


LEAVES = [path for path, _ in leaves(root)]


def test_all_commands_are_there() -> None:
    assert {" ".join(path) for path in LEAVES} == {
        "serve", "simulate", "db upgrade", "accounts create", "accounts show", "accounts policy", "accounts prefer",
        "keys create", "keys list", "keys prefer", "keys revoke", "credits grant", "credits adjust", "credits show",
        "grants list", "grants revoke", "sessions list", "sessions show", "audit", "rebuild",
    }  # fmt: skip


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_explains_itself_with_an_example_and_takes_json(path: tuple[str, ...], run: Run) -> None:
    code, out, err = run(*path, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: tollgate {' '.join(path)} ")
    assert f"Example:\n    tollgate {' '.join(path)}" in out or f"tollgate {' '.join(path)}\n" in out
    assert "--json" in out
    assert all(len(line) <= 100 for line in out.splitlines())


def test_the_help_names_the_exit_codes_and_imports_nothing_heavy() -> None:
    script = (
        f"import sys; from gateway.cli import main; code = main(['--help']); print(sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Exit codes: 0 done" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_account_gets_credit_and_a_key_that_works_until_it_is_revoked(
    document: Callable[..., Any], data_dir: Path
) -> None:
    account = document("accounts", "create", "Acme & Söhne")
    granted = document("credits", "grant", account["id"], "12.345678", "--expires", "2999-12-31", "--id", "first")
    assert (granted["state"], granted["amount_micros"], granted["available"]) == ("applied", 12_345_678, "12.345678")
    assert document("credits", "grant", account["id"], "12.345678", "--expires", "2999-12-31", "--id", "first")[
        "available_micros"
    ] == 12_345_678, "the same id gives nothing twice"  # fmt: skip
    shown = document("credits", "show", "Acme & Söhne")
    assert shown["balance"]["available_micros"] == 12_345_678
    assert [(one["id"], one["expires_at"]) for one in shown["grants"]] == [("first", "2999-12-31T23:59:59.999000Z")]

    made = document("keys", "create", "--account", account["id"], "--requests-per-minute", "60")
    header = f"Bearer {made['key']}".encode()

    async def authenticate(ctx: Context) -> Any:
        return await KeyStore(ctx.redis, None, ctx.pepper, keys.fingerprint(ctx.pepper)).authenticate(header)

    principal = on_stores(data_dir, authenticate)
    assert (principal.account_id, principal.requests_per_minute) == (account["id"], 60)
    assert document("keys", "list", "--account", account["id"])["keys"][0]["state"] == "valid"
    assert document("keys", "revoke", made["id"]) == {"id": made["id"], "revoked": True, "changed": True}
    assert document("keys", "revoke", made["id"])["changed"] is False
    with pytest.raises(keys.RevokedKey):
        on_stores(data_dir, authenticate)
    assert document("keys", "list", "--account", account["id"])["keys"][0]["state"] == "revoked"
    shown = document("accounts", "show", account["id"])
    assert (shown["name"], shown["balance"]["available"], shown["keys"]) == ("Acme & Söhne", "12.345678", [])


def test_a_key_s_text_is_printed_once_and_stored_nowhere(document: Callable[..., Any], run: Run) -> None:
    account = document("accounts", "create", "Secretive")
    code, out, err = run("keys", "create", "--account", account["id"])
    assert code == 0
    text = next(word for word in out.split() if word.startswith("tg_live_"))
    assert keys.parse(f"Bearer {text}".encode()).id in out
    assert "cannot be shown again" in err
    assert text not in run("keys", "list")[1]


def test_tables_and_facts_are_for_people(document: Callable[..., Any], run: Run) -> None:
    account = document("accounts", "create", "[bold]Markup[/bold]")
    for arguments in (("accounts", "show"), ("accounts", "show", account["id"]), ("credits", "show", account["id"])):
        code, out, err = run(*arguments)
        assert (code, err) == (0, ""), "no progress where nobody looks"
        assert "\x1b" not in out, "no colours in a pipe"
        assert "[bold]Markup[/bold]" in out
    assert account["id"] in run("accounts", "show")[1]


def test_preferences_of_account_and_key_are_set_shown_and_reach_the_key(
    document: Callable[..., Any], run: Run, data_dir: Path
) -> None:
    account = document("accounts", "create", "Picky")
    made = document("keys", "create", "--account", account["id"])
    said = document("accounts", "prefer", "Picky", "--exclude", "mock/x, groq", "--prefer", "mock", "--tag", "eu")
    lists = {"allowed": None, "excluded": ["mock/x", "groq"], "preferred": ["mock"], "tags": ["eu"]}
    warned = ["model mock/x", "provider groq", "tag eu"]
    assert said == {"account_id": account["id"], "preferences": lists, "keys": 1, "unknown": warned}
    assert document("accounts", "show", "Picky")["preferences"] == lists
    narrow = document("keys", "prefer", made["id"], "--allow", "mock")
    own = {"allowed": ["mock"], "excluded": [], "preferred": [], "tags": []}
    assert narrow == {"id": made["id"], "account_id": account["id"], "preferences": own, "unknown": []}
    (listed,) = document("keys", "list", "--account", "Picky")["keys"]
    assert listed["preferences"] == own
    assert "allowed mock" in run("keys", "list", "--account", "Picky")[1]

    async def authenticate(ctx: Context) -> Any:
        store = KeyStore(ctx.redis, None, ctx.pepper, keys.fingerprint(ctx.pepper))
        return await store.authenticate(f"Bearer {made['key']}".encode())

    routing = on_stores(data_dir, authenticate).preferences
    assert (routing.allowed, routing.excluded, routing.tags) == (("mock",), ("mock/x", "groq"), ("eu",))

    code, out, err = run("accounts", "prefer", "Picky", "--tag", "")
    assert (code, out.splitlines()[1:]) == (
        0, ["  excluded          mock/x, groq", "  preferred         mock", "  keys that follow  1"],
    )  # fmt: skip
    assert err.splitlines() == [
        "warning: the configuration has no model mock/x; this becomes effective once it has.",
        "warning: the configuration has no provider groq; this becomes effective once it has.",
    ]
    assert document("accounts", "prefer", "Picky", "--clear")["preferences"] is None
    code, out, err = run("keys", "prefer", made["id"], "--clear")
    assert (code, err) == (0, "")
    assert "any, in the order of their routes" in out
    assert on_stores(data_dir, authenticate).preferences is None


def test_sessions_are_listed_while_they_run_and_when_the_journal_has_them(
    document: Callable[..., Any], run: Run, data_dir: Path
) -> None:
    account = document("accounts", "create", "Streamer")
    document("credits", "grant", account["id"], "1")
    ref = AccountRef(account["id"], account["shard"])
    sid = f"{int(time.time() * 1000):012x}"
    sid = f"{sid[:8]}-{sid[8:]}-7000-8000-000000000001"
    metadata = b'{"request_id":"r1","route":"gpt-4o-mini","stream":true,"price_version":"p1","counted_prompt":5}'
    attempts = b"""[{"provider":"one","model":"m1","outcome":"stall","status":200,"ms":900,
        "first_content_ms":null,"prompt":5,"output":0,"cost":7},{"provider":"two","model":"m2","outcome":"completed","status":200,"ms":80,
        "first_content_ms":30,"prompt":5,"output":3,"cost":null}]"""

    async def hold(ctx: Context) -> int:
        request = HoldRequest(sid, ref, "key00001", 500, 1, 5, "hash", "owner", "p1", metadata)
        held = await ctx.ledger.reserve(request)
        assert isinstance(held, Held)
        return held.fence

    fence = on_stores(data_dir, hold)
    (running,) = document("sessions", "list", "--account", "Streamer")["sessions"]
    assert (running["id"], running["state"], running["held_micros"]) == (sid, "running", 500)
    assert sid in {one["id"] for one in document("sessions", "list", "--limit", "10000")["sessions"]}

    async def settle(ctx: Context) -> None:
        told = metadata[:-1] + b',"attempts":' + attempts + b"}"
        await ctx.ledger.settle(SessionRef(sid, ref, "key00001", fence), 123, "completed", told)
        flusher = Flusher(ctx.redis, ctx.stores.database_url)
        await flusher.drain()
        await flusher.aclose()

    on_stores(data_dir, settle)
    (finished,) = document("sessions", "list", "--account", account["id"])["sessions"]
    assert (finished["state"], finished["charged_micros"], finished["charged"]) == ("completed", 123, "0.000123")
    assert finished["metadata"]["request_id"] == "r1"
    assert document("sessions", "list", "--account", account["id"], "--limit", "1")["sessions"] == [finished]
    assert document("sessions", "show", sid) == finished
    code, out, err = run("sessions", "show", sid)
    assert (code, err) == (0, "")
    rows = [[cell for cell in map(str.strip, line.split("│")) if cell] for line in out.splitlines()]
    assert ["request_id", "r1"] in rows
    assert ["key_id", "key00001"] in rows
    assert [row for row in rows if row[:1] in (["one"], ["two"])] == [
        ["one", "m1", "stall", "200", "-", "900", "5", "0", "0.000007"],
        ["two", "m2", "completed", "200", "30", "80", "5", "3", "-"],
    ]
    code, _, err = run("sessions", "show", "no-such")
    assert (code, "there is no finished session 'no-such'" in err) == (1, True)


def test_the_audit_passes_and_fails_on_one_micro(document: Callable[..., Any], run: Run, data_dir: Path) -> None:
    account = document("accounts", "create", "Audited")
    document("credits", "grant", account["id"], "3")
    assert document("audit")["ok"] is True
    row = SHARDS[account["shard"]].account + account["id"]

    async def tamper(ctx: Context, by: int) -> None:
        await ctx.redis.call("HINCRBY", row, "av", by)

    on_stores(data_dir, lambda ctx: tamper(ctx, 1))
    try:
        code, out, err = run("audit", "--json")
        assert (code, err) == (1, "")
        report = json.loads(out)
        assert report["ok"] is False
        assert {one["account"] for one in report["differences"]} == {account["id"]}
        assert {one["micros"] for one in report["differences"]} == {1}
        assert all(set(one) == {"account", "what", "redis", "postgres", "micros"} for one in report["differences"])
        code, out, _ = run("audit", "--account", "Audited")
        assert code == 1
        assert account["id"] in out
    finally:
        on_stores(data_dir, lambda ctx: tamper(ctx, -1))
    assert run("audit")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("accounts", "show", "nobody"), 1, "no account with the id or name 'nobody'"),
        (("accounts", "create", "  "), 1, "A name has 1 to 200"),
        (("keys", "revoke", "00000000"), 1, "no key with the id"),
        (("keys", "revoke", "'; DROP TABLE api_key"), 1, "8 characters"),
        (("keys", "create"), 2, "Missing option '--account'"),
        (("keys", "create", "--account", "x", "--parallel-sessions", "0"), 2, "--parallel-sessions"),
        (("accounts", "prefer", "nobody", "--clear"), 1, "no account with the id or name 'nobody'"),
        (("accounts", "prefer", "x"), 2, "Say what to change"),
        (("accounts", "prefer", "x", "--allow", "a,,b"), 2, "'' is not a provider"),
        (("keys", "prefer", "00000000", "--tag", "e u"), 2, "'e u' is not a tag"),
        (("keys", "prefer", "00000000", "--clear"), 1, "no key with the id '00000000'"),
        (("credits", "grant", "x", "NaN"), 2, "at most six decimals"),
        (("credits", "grant", "x", "--", "-1"), 2, "more than 0"),
        (("credits", "grant", "x", "1", "--expires", "soon"), 2, "2026-12-31"),
        (("credits", "adjust", "x", "-0"), 2, "more than 0"),
        (("credits", "adjust", "x", "--5"), 2, "one sign"),
        (("credits", "adjust", "nobody", "-5"), 1, "no account with the id or name 'nobody'"),
        (("grants", "revoke", "nothing"), 1, "grant nothing: there is none with this id"),
        (("nonsense",), 2, "No such command"),
    ],
)  # fmt: skip
def test_a_refusal_is_a_readable_message_and_an_exit_code(
    run: Run, arguments: tuple[str, ...], code: int, message: str
) -> None:
    ended, out, err = run(*arguments)
    assert (ended, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("environ", "code", "message"),
    [
        ({"REDIS_URL": "redis://u:hush@127.0.0.1:1/0"}, 3, "Redis at 127.0.0.1:1: cannot connect: Connection refused"),
        ({"DATABASE_URL": "postgresql://u:hush@127.0.0.1:1/x"}, 3, "Postgres cannot be reached: Connection refused"),
        ({"DATABASE_URL": "mysql://u:hush@h/x"}, 2, "DATABASE_URL"),
        ({"REDIS_URL": "redis://u:hush@h:port/0"}, 2, "the Redis URL"),
        ({"TOLLGATE_SECRET": "short"}, 2, "TOLLGATE_SECRET is too short"),
        ({"TOLLGATE_CONFIG": "/nonexistent.toml"}, 2, "/nonexistent.toml"),
    ],
)
def test_unusable_surroundings_are_one_line_without_a_password(
    run: Run, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], code: int, message: str
) -> None:
    monkeypatch.setenv("TOLLGATE_SECRET", "0123456789abcdef0123456789abcdef")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    ended, out, err = run("keys", "list")
    assert (ended, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1
    assert "hush" not in err


def test_another_secret_shows_in_the_list_of_keys(
    document: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    account = document("accounts", "create", "Moved")
    document("keys", "create", "--account", account["id"])
    monkeypatch.setenv("TOLLGATE_SECRET", "another secret of enough characters")
    assert [one["state"] for one in document("keys", "list", "--account", account["id"])["keys"]] == ["other secret"]


def test_db_upgrade_says_that_nothing_is_to_do(document: Callable[..., Any]) -> None:
    document("accounts", "show")
    answer = document("db", "upgrade")
    assert answer["before"] == answer["revision"]
    assert answer["changed"] is False


def test_the_demo_is_seeded_once_and_its_key_is_private(data_dir: Path, document: Callable[..., Any]) -> None:
    first = on_stores(data_dir, demo.ensure_demo)
    assert on_stores(data_dir, demo.ensure_demo) == first
    assert stat.S_IMODE((data_dir / "demo-key").stat().st_mode) == 0o600
    assert first.key not in repr(first)
    (data_dir / "demo-key").unlink()
    second = on_stores(data_dir, demo.ensure_demo)
    assert second.key != first.key
    assert document("credits", "show", "demo")["balance"]["available_micros"] == demo.CREDITS_MICROS
    assert len(document("accounts", "show", "demo")["keys"]) == 2


def test_the_banner_s_snippets_are_ready_to_paste() -> None:
    for key in ("tg_live_x", None):
        text = demo.banner(demo.base_url("0.0.0.0", 8080), key, "gpt-4o-mini")
        curl, _, python = text.partition("with curl:")[2].partition("with Python (pip install openai):")
        assert subprocess.run(["sh", "-n", "-c", curl], capture_output=True, check=True).stderr == b""
        compile(python, "snippet", "exec")
        assert "http://127.0.0.1:8080/v1" in python
        assert ("tg_live_x" in curl and "tg_live_x" in python) == (key is not None)


def test_simulate_listens_says_where_and_ends_when_asked() -> None:
    command = [sys.executable, "-m", "gateway.cli", "simulate", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 60)[0], "it said nothing within 60 s"
        assert json.loads(process.stdout.readline())["port"] > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


@contextlib.contextmanager
def serving(folder: Path, **environ: str) -> Iterator[tuple[Any, Callable[[], str]]]:
    """`tollgate serve --json` until the block ends: what it said, and a function to read its stderr so far."""
    errors = folder.parent / "serve.stderr"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("TOLLGATE_", "PORT"))}
    command = [sys.executable, "-m", "gateway.cli", "serve", "--json", "--port", "0", "--data-dir", str(folder)]
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(command, env=plain | environ, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            assert select.select([process.stdout], [], [], 60)[0], errors.read_text()
            yield json.loads(process.stdout.readline() or "null"), errors.read_text
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0, errors.read_text()


def status_of_models(said: Any) -> int:
    asked = urllib.request.Request(said["url"] + "/v1/models", headers={"authorization": f"Bearer {said['key']}"})
    try:
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_serve_greets_with_a_key_that_works_and_stays_and_warns_of_another_secret() -> None:
    with tempfile.TemporaryDirectory(prefix="tgserve-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        folder = Path(name) / "data"
        with serving(folder) as (said, stderr):
            assert status_of_models(said) == 200
            assert said["key"] == (folder / "demo-key").read_text().strip()
            assert said["key"] not in stderr()
        with serving(folder, TOLLGATE_SECRET="another secret of enough characters") as (again, stderr):
            assert again["key"] == said["key"]
            assert status_of_models(again) == 401
            assert "1 keys were made with another secret" in stderr()


def test_a_reader_that_leaves_gets_no_traceback(data_dir: Path) -> None:
    environ = {**os.environ, "TOLLGATE_DATA_DIR": str(data_dir)}
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "gateway.cli", "accounts", "show"]
    done = subprocess.run(command, env=environ, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.stderr == b""
