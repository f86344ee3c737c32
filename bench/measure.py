"""What a tree of processes uses, as the kernel tells it: run time to the nanosecond, memory, files.

And what else runs on a core meanwhile, which makes figures worse and says so.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_ESTABLISHED = "01"


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
    """Run time of every thread of the tree."""
    return sum(own_cpu_ns(member) for member in tree(pid))


def own_cpu_ns(pid: int) -> int:
    """Run time of every thread of one process: the first field of each `schedstat`."""
    total = 0
    for schedstat in (_PROC / str(pid) / "task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(schedstat.read_text().split()[0])
    return total


def core_cpu_ns(core: int) -> int:
    """What all processes together have run on a core, to the tick of the clock."""
    for line in (_PROC / "stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, ticks)
            return (user + nice + system + irq + softirq) * _TICK_NS
    raise OSError(f"there is no core {core}")


def memory_mib(pid: int) -> float:
    """Resident memory of the tree; pages that its processes share count in each."""
    return sum(_resident_kib(member) for member in tree(pid)) / 1024


def files_open(pid: int) -> int:
    """File descriptors of the tree."""
    total = 0
    for member in tree(pid):
        with contextlib.suppress(OSError):
            total += len(list((_PROC / str(member) / "fd").iterdir()))
    return total


def connections(port: int, pids: list[int]) -> dict[int, int]:
    """How many connections that came in at the port each process holds."""
    suffix = f":{port:04X}"
    inodes = set()
    for line in (_PROC / "net" / "tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(suffix) and fields[3] == _ESTABLISHED:
            inodes.add(f"socket:[{fields[9]}]")
    return {pid: sum(link in inodes for link in _links(pid)) for pid in pids}


def _links(pid: int) -> Iterator[str]:
    for file in (_PROC / str(pid) / "fd").iterdir():
        with contextlib.suppress(OSError):
            yield os.readlink(file)


def _resident_kib(pid: int) -> int:
    for line in _status(pid):
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def _status(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        yield from (_PROC / str(pid) / "status").read_text().splitlines()
