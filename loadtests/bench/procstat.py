"""CPU time and memory of processes, from the kernel's own books.

Must not: sample: a difference of two readings is exact.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

Groups = Mapping[str, Iterable[int]]
"""Process ids by a name for their sum."""

_PAGE = os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of all threads that these processes have had, in seconds, to the nanosecond."""
    total = 0.0
    for pid in pids:
        # The number of a process's CPU clock, as clock_getcpuclockid(3) makes it: /proc/<pid>/stat counts in 10 ms.
        clock = (~pid << 3) | 2
        with contextlib.suppress(OSError):
            total += time.clock_gettime(clock)
    return total


def rss_mib(pids: Iterable[int]) -> float:
    """Resident memory, shared pages counted in each process."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    return total / (1 << 20)


def cpu_of(groups: Groups) -> dict[str, float]:
    """CPU seconds by group."""
    return {name: cpu_seconds(pids) for name, pids in groups.items()}


def rss_of(groups: Groups) -> dict[str, float]:
    """Resident MiB by group."""
    return {name: rss_mib(pids) for name, pids in groups.items()}


def difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """What was used between two readings."""
    return {name: after[name] - before[name] for name in after}


def children(parent: int) -> dict[int, tuple[str, ...]]:
    """The command lines of a process's children by process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                found[int(folder.name)] = tuple(words)
    return found
