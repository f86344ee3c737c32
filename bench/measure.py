"""What a tree of processes uses, as the kernel tells it: run time to the nanosecond, memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")


def tree(pid: int) -> list[int]:
    """The process and all its descendants that are alive."""
    children: dict[int, list[int]] = {}
    for stat in _PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The command's name stands in brackets and may hold anything.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for member in found:
        found.extend(children.get(member, ()))
    return found


def cpu_ns(pid: int) -> int:
    """Run time of every thread of the tree: the first field of each `schedstat`."""
    total = 0
    for member in tree(pid):
        for schedstat in (_PROC / str(member) / "task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                total += int(schedstat.read_text().split()[0])
    return total


def memory_mib(pid: int) -> float:
    """Resident memory of the tree; pages that its processes share count in each."""
    return sum(_resident_kib(member) for member in tree(pid)) / 1024


def _resident_kib(pid: int) -> int:
    for line in _status(pid):
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def _status(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        yield from (_PROC / str(pid) / "status").read_text().splitlines()
