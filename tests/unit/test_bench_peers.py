"""`make bench-peers` without a peer: its ratios and table, and what it says of a peer that cannot be had."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.bench import peer_processes, peers
from loadtests.bench.peers import Load, Pair, Result
from loadtests.bench.stack import ROOT

LOAD = Load(connections=8, streams=25, rate=50)
LITELLM = Result(
    "LiteLLM",
    "1.2.3",
    LOAD,
    theirs=Pair(request=6000, chunk=390),
    ours=Pair(request=150, chunk=30),
    workers=Pair(request=125, chunk=26),
    least=Pair(request=40, chunk=20),
)
OVERLOADED = Result(
    "Portkey",
    "4.5.6",
    Load(connections=8, streams=100, rate=50),
    theirs=Pair(request=900, chunk=90),
    ours=Pair(request=300, chunk=30),
    workers=Pair(request=225, chunk=25),
    least=Pair(request=5, chunk=2),
    notes=("portkey overloaded with 100 x 50/s",),
)


def test_a_ratio_is_the_peers_cost_over_all_of_tollgates_processes() -> None:
    assert LITELLM.ratio == Pair(request=40, chunk=13)


def test_a_ratio_at_its_target_is_ok_and_one_below_is_missed() -> None:
    assert [peers.verdict(ratio, 40) for ratio in (40.0, 41.0, 39.9)] == ["ok", "ok", "MISSED"]


def test_a_ratio_of_an_overloaded_target_is_neither() -> None:
    assert peers.verdict(3.0, 2, ("one of them was overloaded",)) == "overloaded"


def test_each_peer_has_its_line_and_tollgates_at_the_same_load() -> None:
    lines = [re.split(r"\s{2,}", line.strip()) for line in peers.table([LITELLM, OVERLOADED], "0.1.0").splitlines()]
    assert lines[0] == [
        "peer",
        "version",
        "load",
        "us/request",
        "us/chunk",
        *("x request", "target", "x chunk", "target"),
    ]
    assert lines[2] == [
        *("LiteLLM", "1.2.3", "8 connections, 25 streams x 50/s", "6000", "390.0"),
        *("40.0x", ">= 40x", "ok", "13.0x", ">= 20x", "MISSED"),
    ]
    assert lines[3] == ["Tollgate", "0.1.0", "the same", "150", "30.0"]
    assert lines[4] == ["data worker", "125", "26.0", "48.0x", "15.0x"]
    assert lines[5][0] == "Portkey"
    assert lines[5][-6:] == ["3.0x", ">= 5x", "MISSED", "3.0x", ">= 2x", "overloaded"]
    assert lines[-1] == ["portkey overloaded with 100 x 50/s"]


def test_json_keeps_figures_ratios_verdicts_and_what_was_left_out() -> None:
    found = json.loads(peers.as_json([OVERLOADED], {"litellm": "no network"}, {"cores": 2}))
    (row,) = found["peers"]
    assert row["theirs"] == {"request": 900, "chunk": 90}
    assert row["ratio"] == {"request": 3, "chunk": 3}
    assert row["verdict"] == {"request": "MISSED", "chunk": "overloaded"}
    assert found["left_out"] == {"litellm": "no network"}
    assert found["machine"] == {"cores": 2}


def test_the_targets_are_those_of_the_issue() -> None:
    assert {peer.name: least for peer, _, least in peers.PEERS} == {
        "litellm": Pair(request=40, chunk=20),
        "portkey": Pair(request=5, chunk=2),
    }


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (
            "WARNING: retrying\nERROR: No matching distribution found for a==1\n",
            "ERROR: No matching distribution found for a==1",
        ),
        ("npm error code ENOTFOUND\nnpm error A complete log of this run is somewhere\n", "npm error code ENOTFOUND"),
        ("first\n\nlast line\n\n", "last line"),
        ("", "no word about why"),
    ],
)
def test_the_reason_is_the_line_of_the_installer_that_tells_most(output: str, said: str) -> None:
    assert peer_processes.reason(output) == said


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(peer_processes.Missing, match=r"^no-such-program is missing$"):
        peer_processes.run(["/nowhere/no-such-program"], "it cannot install")


def test_an_installer_that_fails_or_takes_too_long_is_told_in_one_line() -> None:
    fails = [sys.executable, "-c", "import sys; sys.exit('a word\\nERROR: no network\\nmore')"]
    with pytest.raises(peer_processes.Missing, match=r"^it cannot install: ERROR: no network$"):
        peer_processes.run(fails, "it cannot install")
    with pytest.raises(peer_processes.Missing, match=r"^it cannot install: not done within 0 s$"):
        peer_processes.run([sys.executable, "-c", "import time; time.sleep(60)"], "it cannot install", limit_s=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="the bench reads CPU time as Linux tells it")
def test_a_peer_that_cannot_be_had_is_one_line_and_no_failure(tmp_path: Path) -> None:
    kept = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.bench.peers", "portkey", "--json", str(kept)],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Portkey is not measured: node is missing\n", "")
    assert json.loads(kept.read_text())["left_out"] == {"portkey": "node is missing"}


def test_the_locks_pin_every_package_by_hash_and_name_no_registry() -> None:
    lock = json.loads((peer_processes.NPM_FILES / "package-lock.json").read_text())
    packages = {name: each for name, each in lock["packages"].items() if name}
    assert packages["node_modules/@portkey-ai/gateway"]["version"] == "1.15.2"
    assert [name for name, each in packages.items() if "integrity" not in each or "resolved" in each] == []
    assert "://" not in peer_processes.LOCK.read_text()
