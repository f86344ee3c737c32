"""`make bench`: the CPU time that Rungway takes for a call, with nginx beside it.

The process under test has core 0 for itself; wrk and the fake upstream share core 1. CPU time is
the scheduler's own count for the whole process tree, divided by what the upstream sent in the same
window: both are read in the middle of a running load, so nothing depends on where a run begins or
ends. Each row is the median of three runs with the lowest and the highest beside it. Results hold
for one machine; the factor between two columns is what travels.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from bench.load import WORKLOADS, LoadError, Workload, check_once, get_json, loaded
from bench.measure import cpu_ns, memory_mib
from bench.proxies import Proxy, Running, nginx, pinned_process, rungway

RESULTS = Path(__file__).parent / "RESULTS.md"


@dataclass(frozen=True)
class Pace:
    runs: int
    warm_s: float
    window_s: float


FULL = Pace(runs=3, warm_s=1.5, window_s=4)
QUICK = Pace(runs=1, warm_s=0.5, window_s=1)


@dataclass
class Reading:
    """One workload on one proxy, a number for each run."""

    cpu_us: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)


@dataclass
class Column:
    """All that is known of one proxy."""

    proxy: Proxy
    start_s: list[float] = field(default_factory=list)
    idle_mib: list[float] = field(default_factory=list)
    after_mib: list[float] = field(default_factory=list)
    readings: dict[str, Reading] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short run; RESULTS.md is kept")
    options = parser.parse_args()
    pace = QUICK if options.quick else FULL
    require_programs()
    signal.signal(signal.SIGTERM, _leave)
    # This process, and with it wrk and the upstream, keeps off the core that is measured.
    os.sched_setaffinity(0, {1})
    columns = [Column(nginx()), Column(rungway())]
    upstream = [sys.executable, "-m", "bench.upstream", "0"]
    try:
        with pinned_process(upstream, core=1) as process:
            assert process.stdout is not None
            upstream_port = int(process.stdout.readline())
            for run in range(pace.runs):
                for column in columns:
                    say(f"→ run {run + 1} of {pace.runs}: {column.proxy.name}")
                    measure_all(column, upstream_port, pace)
    except LoadError as error:
        raise SystemExit(f"✗ {error}") from None
    text = report(columns, pace)
    print(text)
    if not options.quick:
        RESULTS.write_text(text)
        say(f"→ written to {os.path.relpath(RESULTS)}")


def _leave(*_: object) -> NoReturn:
    raise SystemExit(1)


def require_programs() -> None:
    missing = [name for name in ("wrk",) if shutil.which(name) is None]
    if shutil.which("nginx") is None and not Path("/usr/sbin/nginx").exists():
        missing.append("nginx-light")
    if missing:
        raise SystemExit(f"✗ not on this machine: apt install {' '.join(missing)}")
    if not {0, 1} <= os.sched_getaffinity(0):
        raise SystemExit("✗ the bench needs two cores: one for what is measured, one for the load")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure_all(column: Column, upstream_port: int, pace: Pace) -> None:
    with column.proxy.up(upstream_port) as running:
        column.start_s.append(running.start_s)
        column.idle_mib.append(running.idle_mib)
        for workload in WORKLOADS:
            check_once(running.port, workload)
            reading = column.readings.setdefault(workload.name, Reading())
            measure(reading, running, workload, upstream_port, pace)
        column.after_mib.append(memory_mib(running.pid))


def measure(
    reading: Reading, running: Running, workload: Workload, upstream_port: int, pace: Pace
) -> None:
    # wrk takes whole seconds; the rest is a margin in which nothing is read.
    with loaded(running.port, workload, pace.warm_s + pace.window_s + 1):
        time.sleep(pace.warm_s)
        sent, cpu, at = counted(upstream_port, workload), cpu_ns(running.pid), time.monotonic()
        time.sleep(pace.window_s)
        sent, cpu = counted(upstream_port, workload) - sent, cpu_ns(running.pid) - cpu
        elapsed_s = time.monotonic() - at
    if sent <= 0:
        raise LoadError(f"{workload.name}: nothing came through")
    reading.cpu_us.append(cpu / 1000 / sent)
    reading.per_s.append(sent / elapsed_s)
    reading.busy.append(cpu / 1e9 / elapsed_s)


def counted(upstream_port: int, workload: Workload) -> int:
    count: int = get_json(upstream_port, "/count")[workload.unit]
    return count


# --- the report ---------------------------------------------------------------------------------


def report(columns: list[Column], pace: Pace) -> str:
    limit, ours = columns
    lines = [
        "# What a call costs",
        "",
        f"Median of {pace.runs} runs (lowest to highest), written by `make bench`."
        " CPU time is that of the whole process tree on a core of its own; nginx only passes bytes"
        " through and is the limit, not a rival. Busy: how much of the core was used.",
        "",
        "| | nginx, CPU µs | Rungway, CPU µs | factor | Rungway, a second | busy |",
        "|---|---|---|---|---|---|",
    ]
    for workload in WORKLOADS:
        theirs, mine = limit.readings[workload.name], ours.readings[workload.name]
        factor = statistics.median(mine.cpu_us) / statistics.median(theirs.cpu_us)
        lines.append(
            f"| {workload.name} | {spread(theirs.cpu_us)} | {spread(mine.cpu_us)} | {factor:.1f}"
            f" | {statistics.median(mine.per_s):,.0f} | {statistics.median(mine.busy):.0%} |"
        )
    lines += ["", "| | nginx | Rungway |", "|---|---|---|"]
    for title, name in (
        ("memory, idle, MiB", "idle_mib"),
        ("memory, after the load, MiB", "after_mib"),
        ("start to first answer, s", "start_s"),
    ):
        cells = " | ".join(spread(getattr(column, name), digits=2) for column in columns)
        lines.append(f"| {title} | {cells} |")
    versions = "; ".join(f"{column.proxy.name} {column.proxy.version}" for column in columns)
    lines += ["", f"Versions: {versions}. Machine: {machine()}.", ""]
    return "\n".join(lines)


def spread(values: list[float], digits: int = 1) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def machine() -> str:
    model = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release().partition('-')[0]}"


if __name__ == "__main__":
    main()
