"""`make bench`: the CPU time that Rungway takes for a call, with its peers beside it.

What is under test has core 0 for itself; wrk and the fake upstream share core 1. CPU time is the
scheduler's own count for the whole process tree, divided by what the upstream sent in the same
window: both are read in the middle of a running load, so nothing depends on where a run begins or
ends. All are measured by turns in each of the runs, so that a slow minute of the machine is in
everybody's figures. See bench/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import resource
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

from bench import clients
from bench.figures import Figures
from bench.keys import STORED_KEY, make_state
from bench.load import (
    EMBEDDINGS,
    WORKLOADS,
    LoadError,
    Workload,
    check_once,
    get_json,
    headers_for,
    loaded,
)
from bench.measure import connections, core_cpu_ns, cpu_ns, memory_mib, own_cpu_ns, tree
from bench.peers import PEERS, Missing
from bench.plot import plot
from bench.proxies import (
    LOAD_CORE,
    OUT,
    TESTED_CORE,
    NotStarted,
    Proxy,
    Running,
    pinned_process,
    rungway,
    rungway_bare,
    with_key,
)
from bench.report import report

HERE = Path(__file__).parent
STATES = OUT / "states"
RESULTS, PLOT = HERE / "RESULTS.md", HERE / "results.svg"

# Every proxy has these; the others are Rungway's alone.
SHARED_COSTS = ("chat", "stream", "events", "embeddings")
OWN_COSTS = ("chat-uncached", "stream-uncached", "events-uncached")
ROWS = (
    *("chat", "stream", "events", "embeddings", "hit", "latency", "memory"),
    *("keys", "rungs", "streams", "entries", "workers"),
)
_PACE_PER_S = 200.0
# Of a second; with less to spare than this, a queue is measured.
_CAPACITY_US = 800_000
_INPUTS_A_CALL = 2_048
# A reading is taken again where others had more of the core than this, and the best is kept.
_FOREIGN_MAX = 0.05
_QUIET_BELOW = 0.15


@dataclass(frozen=True)
class Pace:
    """How long each part takes, and the sizes that growth is measured to."""

    runs: int
    tries: int
    warm_s: float
    window_s: float
    latency_s: float
    quiet_s: float
    keys: int
    entries: int
    streams: int
    rungs: int = 200


FULL = Pace(3, 3, 1.5, 3.5, 10, 30, keys=100_000, entries=1_000_000, streams=5_000)
QUICK = Pace(1, 1, 0.5, 1.0, 3, 1, keys=2_000, entries=50_000, streams=1_000)


@dataclass(frozen=True)
class Cost:
    """`foreign` is the share of the core that other processes had in the window."""

    cpu_us: float
    busy: float
    foreign: float


class Bench:
    """One run of `make bench`."""

    def __init__(self, pace: Pace, rows: set[str], upstream_port: int) -> None:
        self.pace, self.rows, self.upstream_port = pace, rows, upstream_port
        self.figures = Figures()

    # --- what all are measured by -----------------------------------------------------------------

    def proxy(self, proxy: Proxy) -> None:
        """All rows of one proxy, in one life of it. Raises NotStarted."""
        costs = [name for name in SHARED_COSTS if name in self.rows]
        if proxy.name == "rungway":
            costs += [name for name in OWN_COSTS if name.partition("-")[0] in self.rows]
        self.wait_for_quiet()
        with proxy.up(self.upstream_port) as running:
            self.figures.add("start", proxy.name, running.start_s)
            self.figures.add("idle", proxy.name, _megabytes(running.idle_mib))
            for name in costs:
                with self.noted(proxy.name, name):
                    self.cost(proxy.name, running, WORKLOADS[name])
            if proxy.name == "rungway" and "hit" in self.rows:
                with self.noted(proxy.name, "hit"):
                    self.hit(running)
            if "latency" in self.rows:
                with self.noted(proxy.name, "latency"):
                    self.latency(proxy.name, running)
        if "memory" in self.rows:
            with self.noted(proxy.name, "memory"), proxy.up(self.upstream_port) as running:
                self.memory(proxy.name, running, min(self.pace.streams, proxy.streams_max))

    @contextlib.contextmanager
    def noted(self, who: str, row: str) -> Iterator[None]:
        """A row that fails is named in the results, and the run goes on: it is half an hour's."""
        try:
            yield
        except (
            LoadError,
            OSError,
            TimeoutError,
            http.client.HTTPException,
            ExceptionGroup,
        ) as error:
            line = f"{who}, {row}: {' '.join(str(error).split())[:300]}"
            say(f"✗ {line}")
            if line not in self.figures.not_measured:
                self.figures.not_measured.append(line)

    def cost(self, column: str, running: Running, workload: Workload, row: str = "") -> float:
        row = row or workload.name
        check_once(running.port, workload, running.dialect)
        found = self.cost_now(running, workload)
        self.figures.add(row, column, found.cpu_us)
        self.figures.add_busy(row, column, found.busy)
        self.figures.foreign.append(found.foreign)
        return found.cpu_us

    def cost_now(self, running: Running, workload: Workload) -> Cost:
        """The least disturbed of a few readings, the first where nothing disturbs it."""
        best: Cost | None = None
        for _ in range(self.pace.tries):
            self.wait_for_quiet()
            cost = self.one_cost(running, workload)
            if best is None or cost.foreign < best.foreign:
                best = cost
            if best.foreign <= _FOREIGN_MAX:
                break
        assert best is not None
        return best

    def one_cost(self, running: Running, workload: Workload) -> Cost:
        pace = self.pace
        for_s = pace.warm_s + pace.window_s + 0.5
        with loaded(running.port, workload, running.dialect, for_s):
            time.sleep(pace.warm_s)
            sent, window = self.sent(workload), _Window(running.pid)
            time.sleep(pace.window_s)
            sent, (cpu, busy, foreign) = self.sent(workload) - sent, window.ended()
        if sent <= 0:
            raise LoadError(f"{workload.name}: nothing came through")
        return Cost(cpu / 1000 / sent, busy, foreign)

    def sent(self, workload: Workload) -> int:
        count: int = get_json(self.upstream_port, "/count")[workload.unit]
        return count

    def hit(self, running: Running) -> None:
        """The upstream sees nothing of these, so wrk's own count is taken, over its whole run."""
        workload = WORKLOADS["hit"]
        check_once(running.port, workload, running.dialect)
        with loaded(running.port, workload, running.dialect, self.pace.warm_s):
            pass
        sent = self.sent(workload)
        window = _Window(running.pid)
        with loaded(running.port, workload, running.dialect, self.pace.window_s) as load:
            pass
        cpu, busy, foreign = window.ended()
        if self.sent(workload) > sent:
            raise LoadError("a call that was to be a cache hit went upstream")
        self.figures.add("hit", "rungway", cpu / 1000 / load.answers)
        self.figures.add_busy("hit", "rungway", busy)
        self.figures.foreign.append(foreign)

    def latency(self, column: str, running: Running) -> None:
        """What the proxy adds to calls at a gentle pace: its quantile less the upstream's own."""
        cost_us = self.figures.median("chat", column)
        if cost_us is not None and cost_us * _PACE_PER_S > _CAPACITY_US:
            raise LoadError(f"{_PACE_PER_S:g} calls a second are more than its core can do")
        self.wait_for_quiet()
        direct, through = clients.latencies(
            (self.upstream_port, running.dialect),
            (running.port, running.dialect),
            WORKLOADS["chat"],
            _PACE_PER_S,
            self.pace.latency_s,
        )
        for name, share in (("latency-p50", 0.50), ("latency-p99", 0.99)):
            added_s = _quantile(through, share) - _quantile(direct, share)
            self.figures.add(name, column, added_s * 1e6)

    def memory(self, column: str, running: Running, streams: int) -> None:
        # A first few, so that what is made once is not counted as the streams'.
        with self.held(running, 16):
            pass
        before = memory_mib(running.pid)
        with self.held(running, streams):
            time.sleep(1)
            grown_mib = memory_mib(running.pid) - before
        self.figures.add("open-stream", column, _megabytes(grown_mib) * 1000 / streams)

    @contextlib.contextmanager
    def held(self, running: Running, count: int) -> Iterator[None]:
        """So many streams are open meanwhile, and say nothing."""
        command = [sys.executable, *clients.arguments(running.port, count, running.dialect)]
        with pinned_process(command, LOAD_CORE) as process:
            assert process.stdout is not None
            opened = process.stdout.readline().strip()
            if opened != str(count):
                raise LoadError(f"{count} streams could not be opened: {opened or 'none were'}")
            yield

    def wait_for_quiet(self) -> None:
        """Until others leave the core alone, for a while at most; what they took is reported."""
        until = time.monotonic() + self.pace.quiet_s
        while time.monotonic() < until:
            before = core_cpu_ns(TESTED_CORE)
            time.sleep(0.2)
            if core_cpu_ns(TESTED_CORE) - before < _QUIET_BELOW * 0.2e9:
                return

    # --- growth -----------------------------------------------------------------------------------

    def growth(self, row: str, small: Proxy, large: Proxy, sizes: tuple[int, int]) -> None:
        """The same call at two sizes of something, one after the other."""
        for proxy, size in zip((small, large), sizes, strict=True):
            with proxy.up(self.upstream_port) as running:
                self.cost(f"{size:,}", running, WORKLOADS["chat"], row)

    def keys(self) -> None:
        sizes = (1, self.pace.keys)
        states = [make_state(STATES / f"keys-{size}.db", size) for size in sizes]
        small, large = (
            with_key(rungway("rungway", state=f"sqlite://{state}"), STORED_KEY) for state in states
        )
        self.growth("keys", small, large, sizes)

    def rungs(self) -> None:
        sizes = (1, self.pace.rungs)
        small, large = (rungway("rungway", rungs=size) for size in sizes)
        self.growth("rungs", small, large, sizes)

    def streams(self) -> None:
        """Comments that keep streams alive cost what they cost, but are no part of a call."""
        with rungway("rungway", keepalive_s=600).up(self.upstream_port) as running:
            self.cost("1", running, WORKLOADS["chat"], "streams")
            with self.held(running, self.pace.streams):
                self.cost(f"{self.pace.streams:,}", running, WORKLOADS["chat"], "streams")

    def entries(self) -> None:
        with rungway("rungway", cache_mib=2_048).up(self.upstream_port) as running:
            self.cost("1", running, WORKLOADS["chat"], "entries")
            fill_cache(running, self.pace.entries)
            self.cost(f"{self.pace.entries:,}", running, WORKLOADS["chat"], "entries")

    def workers(self) -> None:
        """Two workers on the one core: what a call costs, and how evenly they share the load."""
        workload = replace(WORKLOADS["chat"], connections=64)
        for count in (1, 2):
            with rungway("rungway", workers=count).up(self.upstream_port) as running:
                self.cost(f"{count}", running, workload, "workers")
                if count == 2:
                    self.split(running, workload)

    def split(self, running: Running, workload: Workload) -> None:
        """The smaller part of the connections, and of the CPU time, of two workers."""
        pids = tree(running.pid)[1:]
        for_s = self.pace.warm_s + self.pace.window_s + 0.5
        with loaded(running.port, workload, running.dialect, for_s):
            time.sleep(self.pace.warm_s)
            held = list(connections(running.port, pids).values())
            before = [own_cpu_ns(pid) for pid in pids]
            time.sleep(self.pace.window_s)
            used = [own_cpu_ns(pid) - cpu for pid, cpu in zip(pids, before, strict=True)]
        self.figures.add("split-connections", "2", min(held) / max(1, sum(held)))
        self.figures.add("split-cpu", "2", min(used) / max(1, sum(used)))


class _Window:
    """What the tree and the core run between two moments."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._cpu, self._core, self._at = self._read()

    def _read(self) -> tuple[int, int, int]:
        return cpu_ns(self._pid), core_cpu_ns(TESTED_CORE), time.monotonic_ns()

    def ended(self) -> tuple[int, float, float]:
        """Nanoseconds of the tree, and what part of the core it and the others had."""
        cpu, core, at = self._read()
        cpu, core, elapsed = cpu - self._cpu, core - self._core, at - self._at
        return cpu, cpu / elapsed, max(0.0, (core - cpu) / elapsed)


def fill_cache(running: Running, entries: int) -> None:
    """Many small vectors, each an entry of its own."""
    path = running.dialect.prefix + EMBEDDINGS
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    for first in range(0, entries, _INPUTS_A_CALL):
        inputs = [f"entry {number}" for number in range(first, first + _INPUTS_A_CALL)]
        body = {
            "model": running.dialect.embed_model,
            "input": inputs,
            "dimensions": 8,
            "encoding_format": "base64",
        }
        connection.request("POST", path, json.dumps(body), headers_for(running.dialect))
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise LoadError(f"filling the cache: answered {response.status}: {answer[:300]!r}")
    connection.close()


def _quantile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=1000)[round(share * 1000) - 1]


def _megabytes(mebibytes: float) -> float:
    return mebibytes * 2**20 / 1e6


# --- the command ----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short run; RESULTS.md is kept")
    parser.add_argument("--rows", type=_names(ROWS), help=f"some of: {','.join(ROWS)}")
    parser.add_argument("--peers", type=_names((*PEERS, "")), help=f"some of: {','.join(PEERS)}")
    options = parser.parse_args()
    pace = QUICK if options.quick else FULL
    rows = set(ROWS) if options.rows is None else options.rows
    peers = set(PEERS) if options.peers is None else options.peers
    require_machine()
    signal.signal(signal.SIGTERM, _leave)
    upstream = [sys.executable, "-m", "bench.upstream", "0"]
    try:
        with pinned_process(upstream, LOAD_CORE) as process:
            assert process.stdout is not None
            bench = Bench(pace, rows, int(process.stdout.readline()))
            proxies = measure_all(bench, peers)
    except (LoadError, ExceptionGroup) as error:
        raise SystemExit(f"✗ {error}") from None
    text = report(bench.figures, proxies, pace.runs)
    print(text)
    OUT.mkdir(exist_ok=True)
    (OUT / "results.json").write_text(json.dumps(asdict(bench.figures), indent=1))
    is_whole = not options.quick and rows == set(ROWS) and peers == set(PEERS)
    place = HERE if is_whole else OUT
    (place / RESULTS.name).write_text(text)
    (place / PLOT.name).write_text(plot(bench.figures))
    say(f"→ written to {os.path.relpath(place / RESULTS.name)} and {PLOT.name}")


def _names(known: tuple[str, ...]) -> Callable[[str], set[str]]:
    def parse(text: str) -> set[str]:
        names = set(text.split(","))
        if not names <= set(known):
            raise argparse.ArgumentTypeError(f"not among {', '.join(known)}")
        return names

    return parse


def _leave(*_: object) -> NoReturn:
    raise SystemExit(1)


def require_machine() -> None:
    if shutil.which("wrk") is None:
        raise SystemExit("✗ not on this machine: apt install wrk")
    if not {TESTED_CORE, LOAD_CORE} <= os.sched_getaffinity(0):
        raise SystemExit("✗ the bench needs two cores: one for what is measured, one for the load")
    # This process, and with it wrk, keeps off the core that is measured.
    os.sched_setaffinity(0, {LOAD_CORE})
    # Each of 5,000 streams is two files of the proxy.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure_all(bench: Bench, peers: set[str]) -> list[Proxy]:
    """Who was measured. A peer that does not start is asked once, and named."""
    # With the states goes what the host remembers of them.
    shutil.rmtree(STATES, ignore_errors=True)
    proxies = [rungway(), rungway_bare()]
    for name in PEERS:
        if name not in peers:
            bench.figures.not_measured.append(f"{name}: not asked for")
        elif isinstance(peer := PEERS[name](), Missing):
            bench.figures.not_measured.append(f"{peer.name}: {peer.reason}")
        else:
            proxies.append(peer)
    for run in range(bench.pace.runs):
        for proxy in list(proxies):
            say(f"→ run {run + 1} of {bench.pace.runs}: {proxy.name}")
            try:
                bench.proxy(proxy)
            except NotStarted as error:
                if proxy.name.startswith("rungway"):
                    raise
                proxies.remove(proxy)
                bench.figures.not_measured.append(str(error))
        for row in ("keys", "rungs", "streams", "entries", "workers"):
            if row in bench.rows:
                say(f"→ run {run + 1} of {bench.pace.runs}: rungway, {row}")
                grow: Callable[[], None] = getattr(bench, row)
                with bench.noted("rungway", row):
                    grow()
    return proxies


if __name__ == "__main__":
    main()
