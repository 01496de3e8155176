"""The house rules that a program can check: sizes, layers, types, style, and documents that name what exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
ARCHITECTURE_LINES_MAX = 150
DECISION_LINES_MAX = 40
PACKAGES = ("gateway", "proxy", "accounts", "metering", "providers", "storage", "config", "migrations", "loadtests")


def sources() -> list[Path]:
    """Every Python file of ours, tests included."""
    return [path for name in (*PACKAGES, "tests") for path in sorted((ROOT / name).rglob("*.py"))]


def run(*command: str) -> None:
    """Run a checker of this environment; its output is the failure's text."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


def test_files_stay_below_the_line_limit() -> None:
    long = {str(path): lines for path in sources() if (lines := len(path.read_text().splitlines())) > FILE_LINES_MAX}
    assert long == {}


def test_functions_stay_below_the_line_limit() -> None:
    long = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    long.append(f"{path}:{node.lineno} {node.name} {lines}")
    assert long == []


def test_lua_files_stay_below_the_line_limit() -> None:
    assert [str(path) for path in ROOT.glob("metering/lua/*.lua") if len(path.read_text().splitlines()) > 200] == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path)
        for path in sources()
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_every_package_is_known_to_the_layer_check() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert found == set(config["tool"]["importlinter"]["root_packages"]) == set(PACKAGES)


def catches_all(handler: ast.ExceptHandler) -> bool:
    """Whether a handler swallows everything: clean-up that ends in a bare `raise` does not."""
    broad = handler.type is None or (isinstance(handler.type, ast.Name) and handler.type.id.endswith("Exception"))
    broad = broad and (handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException"))
    last = handler.body[-1]
    return broad and not (isinstance(last, ast.Raise) and last.exc is None)


def test_only_the_command_lines_edge_catches_everything() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and catches_all(node)
    }
    assert found == {"gateway/cli/app.py"}


def test_every_dependency_says_why_it_is_here() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text.split("dependencies = [", 1)[1].split("\n]", 1)[0]
    lines = [line for line in block.splitlines() if line.strip()]
    assert lines
    assert [line for line in lines if "#" not in line] == []


def test_architecture_names_only_what_exists_and_is_short() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert len(text.splitlines()) <= ARCHITECTURE_LINES_MAX
    named = set(re.findall(r"`([a-z_]+/[A-Za-z0-9_./*-]*)`", text))
    assert named
    missing = [name for name in sorted(named) if not list(ROOT.glob(name.rstrip("/")))]
    assert missing == []


def test_decision_records_are_short() -> None:
    records = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert records
    assert [str(path) for path in records if len(path.read_text().splitlines()) > DECISION_LINES_MAX] == []


def test_documents_link_to_files_that_exist() -> None:
    broken = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            if not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)} -> {target}")
    assert broken == []


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)],
    ids=lambda command: " ".join(command),
)
def test_checkers_are_content(command: tuple[str, ...]) -> None:
    run(*command)


def test_layers_hold() -> None:
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]


def test_a_data_worker_loads_neither_sqlalchemy_nor_alembic_nor_price_tables() -> None:
    code = (
        "import sys, gateway.worker\n"
        "print([name for name in ('sqlalchemy', 'alembic', 'genai_prices') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
