"""The lock files: hashed, no addresses, in step with pyproject.toml and the .in files. Must not use the network."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LOCKS = [f"requirements{kind}.lock" for kind in ("", "-dev", "-real-build", "-real", "-bench")]
RUNTIME, DEVELOPMENT = ["requirements.in"], ["requirements.in", "requirements-dev.in"]
PLATFORMS = [
    {"sys_platform": system, "platform_system": name, "platform_machine": machine, "python_version": python}
    | {"python_full_version": f"{python}.4", "platform_python_implementation": "CPython", "os_name": "posix"}
    for system, name, machine in [
        ("linux", "Linux", "x86_64"),
        ("linux", "Linux", "aarch64"),
        ("darwin", "Darwin", "arm64"),
    ]
    for python in ["3.11", "3.12", "3.13", "3.14"]
]


def entries(name: str) -> list[str]:
    """The file's logical lines: comments gone, continuations joined."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for raw in text.splitlines() if (line := raw.split(" #")[0].strip()) and not line.startswith("#")]


def locked(name: str, platform: dict[str, str] | None = None) -> dict[str, Version]:
    """Package -> version, of the entries in force on `platform` (all entries without one)."""
    versions: dict[str, Version] = {}
    for entry in entries(name):
        requirement = Requirement(entry.split(" --hash")[0])
        if platform is None or _applies(requirement.marker, platform):
            (pin,) = requirement.specifier
            versions[canonicalize_name(requirement.name)] = Version(pin.version)
    return versions


def wanted(sources: list[str]) -> list[Requirement]:
    """What pyproject.toml and the given .in files ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for source in sources for line in entries(source))]
    return [Requirement(line) for line in lines]


def _applies(marker: Marker | None, platform: dict[str, str]) -> bool:
    return marker is None or marker.evaluate(platform)


@pytest.mark.parametrize("name", LOCKS)
def test_every_entry_is_one_exact_version_with_hashes(name: str) -> None:
    lines = entries(name)
    assert lines
    for line in lines:
        assert re.fullmatch(r"[a-z0-9._-]+==[^\s;*]+( ; [^-]+?)?(\s+--hash=sha256:[0-9a-f]{64})+", line), line


@pytest.mark.parametrize("name", LOCKS)
def test_no_lock_names_an_address_an_index_or_a_place_on_a_machine(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for forbidden in (
        r"https?://",
        r"--index-url",
        r"--extra-index-url",
        r"--find-links",
        r"--trusted-host",
        r"file:",
        r"/\w+/",
    ):
        assert not re.search(forbidden, text), f"{name} contains {forbidden}"


@pytest.mark.parametrize(
    "platform", PLATFORMS, ids=lambda p: f"{p['sys_platform']}-{p['platform_machine']}-{p['python_version']}"
)
@pytest.mark.parametrize(("name", "sources"), [("requirements.lock", RUNTIME), ("requirements-dev.lock", DEVELOPMENT)])
def test_the_lock_satisfies_every_requirement_on_every_platform(
    name: str, sources: list[str], platform: dict[str, str]
) -> None:
    versions = locked(name, platform)
    for requirement in wanted(sources):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{name} lacks {requirement.name}: run `make lock`"
        assert version in requirement.specifier, f"{name} has {version} for {requirement}: run `make lock`"


@pytest.mark.parametrize("name", ["requirements-real-build", "requirements-real"])
def test_the_real_servers_locks_satisfy_their_sources(name: str) -> None:
    versions = locked(f"{name}.lock")
    for line in entries(f"{name}.in"):
        requirement = Requirement(line)
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier


def test_tests_run_on_the_versions_that_are_shipped() -> None:
    development = locked("requirements-dev.lock")
    assert {name: development.get(name) for name in locked("requirements.lock")} == locked("requirements.lock")


def test_the_build_backend_is_locked() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    versions = locked("requirements.lock")
    for line in build:
        requirement = Requirement(line)
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier
