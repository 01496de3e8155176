"""The command line in a test's own process, on a running pair of embedded stores."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.cli import main
from storage.embedded import stores_for

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(name="data_dir", scope="module")
def data_dir_fixture() -> Iterator[Path]:
    """A running pair of stores that commands attach to."""
    with tempfile.TemporaryDirectory(prefix="tgcli-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        folder = Path(name) / "data"
        with stores_for(folder):
            yield folder


@pytest.fixture(name="run")
def run_fixture(data_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: its exit code, stdout and stderr."""
    for name in ("REDIS_URL", "DATABASE_URL", "TOLLGATE_SECRET", "TOLLGATE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOLLGATE_DATA_DIR", str(data_dir))

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(arguments)
        return code, *capfd.readouterr()

    return call


@pytest.fixture(name="document")
def document_fixture(run: Run) -> Callable[..., Any]:
    """Run a command with --json; it must succeed, print exactly one document, and nothing beside it."""

    def call(*arguments: str) -> Any:
        code, out, err = run(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return call
