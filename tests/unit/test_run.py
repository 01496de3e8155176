"""The run file and the secret: private, whole, and readable errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from config.run import RUN_ENV, Run, load_or_create_secret, load_secret, read_run, worker_number, write_run
from config.settings import ConfigError


def a_run(**changed: object) -> Run:
    given: dict[str, object] = {
        "redis_url": "redis://:password@redis",
        "database_url": "postgresql://tollgate:password@db/tollgate",
        "data_dir": "/data",
        "config_path": "/etc/tollgate.toml",
        "catalog_path": "/data/run/catalog.json",
        "metrics_dir": "/data/run/metrics",
        "host": "127.0.0.1",
        "port": 8080,
        "workers": 2,
        "supervisor_pid": 1,
    }
    return Run(**{**given, **changed})  # type: ignore[arg-type]


def test_a_run_file_reads_back_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_run(path, a_run(simulated={"mock": "http://127.0.0.1:1/v1"}))
    assert read_run(path) == a_run(simulated={"mock": "http://127.0.0.1:1/v1"})
    assert read_run(environ={RUN_ENV: str(path)}) == read_run(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_shows_no_password_when_printed() -> None:
    assert "password" not in repr(a_run())


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"{", "not a run file"), (b'{"port": 1}', "not a run file")]
)
def test_an_unusable_run_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{path}: .*{message}"):
        read_run(path)


def test_a_child_started_by_hand_is_told_so() -> None:
    with pytest.raises(ConfigError, match="tollgate serve"):
        read_run(environ={})


def test_the_secret_is_made_once_private_and_kept(tmp_path: Path) -> None:
    first = load_or_create_secret(tmp_path, {})
    assert len(first) >= 32
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert load_or_create_secret(tmp_path, {}) == first
    assert load_secret(a_run(secret_path=str(tmp_path / "secret")), {}) == first
    assert list(tmp_path.iterdir()) == [tmp_path / "secret"]


def test_the_environment_s_secret_wins_and_nothing_is_written(tmp_path: Path) -> None:
    assert load_or_create_secret(tmp_path, {"TOLLGATE_SECRET": "given"}) == b"given"
    assert load_secret(a_run(), {"TOLLGATE_SECRET": "given"}) == b"given"
    assert list(tmp_path.iterdir()) == []


def test_processes_that_make_the_secret_at_the_same_time_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: load_or_create_secret(tmp_path, {}), range(8)))
    assert len(made) == 1


def test_a_secret_open_to_others_or_cut_short_is_refused(tmp_path: Path) -> None:
    load_or_create_secret(tmp_path, {})
    (tmp_path / "secret").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_or_create_secret(tmp_path, {})
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "secret").write_bytes(b"short")
    with pytest.raises(ConfigError, match="cut short"):
        load_or_create_secret(tmp_path, {})


def test_a_missing_secret_is_never_made_anew_for_a_child(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Restore it"):
        load_secret(a_run(secret_path=str(tmp_path / "secret")), {})
    with pytest.raises(ConfigError, match="TOLLGATE_SECRET"):
        load_secret(a_run(), {})


def test_a_worker_knows_its_number_and_is_the_first_where_nothing_is_said() -> None:
    assert [worker_number({"TOLLGATE_WORKER": text}) for text in ("0", "7", "12")] == [0, 7, 12]
    assert worker_number({}) == 0


@pytest.mark.parametrize("text", ["", "one", "-1", "1.0", " 1", "\u0663", "9" * 5_000])
def test_what_is_no_worker_s_number_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"TOLLGATE_WORKER: .*not the number of a worker"):
        worker_number({"TOLLGATE_WORKER": text})
