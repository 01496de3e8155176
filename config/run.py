"""What a running instance tells its child processes: one JSON run file (0600, path in TOLLGATE_RUN); and the secret.

Must not: hold a provider key (those stay in environment variables) or be read at import time.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from config.settings import ConfigError

RUN_ENV = "TOLLGATE_RUN"
WORKER_ENV = "TOLLGATE_WORKER"
SECRET_ENV = "TOLLGATE_SECRET"  # noqa: S105 - a name, not a secret
_SECRET_BYTES = 32
_WORKER_DIGITS_MAX = 6


class Run(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One running instance. Paths are absolute. The store URLs may hold a password: never log this struct.

    `simulated` replaces base URLs: provider name -> base URL of the simulated provider that stands in for it.
    `secret_path` is None when the secret is in the environment (TOLLGATE_SECRET), which children inherit.
    """

    redis_url: str
    database_url: str
    data_dir: str
    config_path: str
    catalog_path: str
    metrics_dir: str
    host: str
    port: int
    workers: int
    supervisor_pid: int
    secret_path: str | None = None
    simulated: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"Run(data_dir={self.data_dir!r}, port={self.port}, workers={self.workers})"


def write_run(path: Path, run: Run) -> None:
    """Write the run file at once (rename), readable by its owner only."""
    _write_private(path, msgspec.json.encode(run))


def read_run(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Run:
    """The run file at `path`, else at TOLLGATE_RUN of `environ`. Raises ConfigError when there is none to read."""
    if path is None:
        named = (environ if environ is not None else os.environ).get(RUN_ENV)
        if not named:
            raise ConfigError(f"{RUN_ENV} is not set: this process is started by `tollgate serve`, not by hand.")
        path = Path(named)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Run)
    except OSError as error:
        raise ConfigError(f"{path}: the run file cannot be read: {error.strerror}.") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: not a run file of this version: {error}.") from None


def worker_number(environ: Mapping[str, str]) -> int:
    """Which of the instance's data workers this process is, from 0; a restarted one keeps its number. 0 where nothing
    is said. Raises ConfigError."""
    text = environ.get(WORKER_ENV, "0")
    if not (text.isascii() and text.isdigit() and len(text) <= _WORKER_DIGITS_MAX):
        raise ConfigError(f"{WORKER_ENV}: '{text[:64]}' is not the number of a worker.")
    return int(text)


def load_or_create_secret(data_dir: Path, environ: Mapping[str, str]) -> bytes:
    """The secret that API keys are hashed with: TOLLGATE_SECRET, else the file `secret` in the data folder.

    The file is made once (0600); two processes that make it at the same time agree on one. Losing it invalidates
    every key. Raises ConfigError when the file is empty or open to other users.
    """
    given = environ.get(SECRET_ENV)
    if given:
        return given.encode()
    path = data_dir / "secret"
    try:
        return _read_secret(path)
    except FileNotFoundError:
        _create_secret(path)
        return _read_secret(path)


def load_secret(run: Run, environ: Mapping[str, str]) -> bytes:
    """The secret of a running instance, for its children. Raises ConfigError when it is missing."""
    if run.secret_path is None:
        given = environ.get(SECRET_ENV)
        if not given:
            raise ConfigError(f"{SECRET_ENV} is not set in this process, but it was for `tollgate serve`.")
        return given.encode()
    try:
        return _read_secret(Path(run.secret_path))
    except FileNotFoundError:
        raise ConfigError(f"{run.secret_path}: the secret is gone. Restore it: without it no key is valid.") from None


def _read_secret(path: Path) -> bytes:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(f"{path}: other users may open the secret (mode {mode:o}). Run: chmod 600 {path}")
    content = path.read_bytes().strip()
    if len(content) < _SECRET_BYTES:
        raise ConfigError(f"{path}: the secret is cut short. Restore it, or remove the file to start with new keys.")
    return content


def _create_secret(path: Path) -> None:
    """Write to the side, then link: the name appears with its whole content, and only if nobody was faster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    side = path.with_name(f"secret.{os.getpid()}.{secrets.token_hex(4)}")
    _write_private(side, secrets.token_hex(_SECRET_BYTES).encode())
    try:
        os.link(side, path)
    except FileExistsError:
        pass
    finally:
        side.unlink()


def _write_private(path: Path, content: bytes) -> None:
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mkstemp makes it 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
