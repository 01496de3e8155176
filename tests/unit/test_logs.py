"""No secret gets into a log line, whoever logs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from config.logs import redact

KEY = "tg_live_abcdEFGH_" + "x" * 43 + "_000000"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"key {KEY} end", "key [redacted] end"),
        ("Authorization: Bearer abcdefghijk", "Authorization: [redacted]"),
        ("sk-proj-abcdefgh12345678", "[redacted]"),
        ("redis://user:secret@host/0", "redis://[redacted]@host/0"),
        ("nothing to hide: a-b", "nothing to hide: a-b"),
    ],
)
def test_secrets_are_taken_out(text: str, left: str) -> None:
    assert redact(text) == left


def test_lines_of_ours_and_of_libraries_are_json_with_the_process_and_without_secrets() -> None:
    code = f"""
import logging, structlog
from config import logs
logs.configure("info", "worker")
structlog.get_logger().info("ours", key="{KEY}")
logging.getLogger("lib").warning("theirs %s", "Bearer abcdefghijk")
try:
    raise ValueError("postgresql://u:hunter2@h/db")
except ValueError:
    structlog.get_logger().exception("failed")
structlog.get_logger().debug("not shown")
for number in range(100):
    logs.lines.info("gathered", {{"number": number, "pad": "x" * 60}})
logs.lines.flush()
logs.lines.info("at exit", {{}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["ours", "theirs [redacted]", "failed", *["gathered"] * 100, "at exit"]
    assert [line["number"] for line in lines if "number" in line] == list(range(100))
    assert re.fullmatch(r"[0-9-]{10}T[0-9:]{8}\.[0-9]{6}Z", lines[-1]["timestamp"])
    assert lines[-1].keys() == {"event", "process", "level", "timestamp"}
    assert {line["process"] for line in lines} == {"worker"}
    assert {"level", "timestamp"} <= set(lines[0])
    assert KEY not in done.stderr
    assert "hunter2" not in done.stderr


def test_a_full_disk_takes_lines_and_nothing_else() -> None:
    code = """
import logging, os, structlog
from config import logs
logs.configure("info", "worker")
structlog.get_logger().error("ours")
logs.lines.info("gathered", {})
logs.lines.flush()
print(logs.lines.lost)
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, text=True, check=True)
    assert done.stdout == "2\n"
