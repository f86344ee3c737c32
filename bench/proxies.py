"""How what is measured is started and ended, and Rungway in the forms that are measured."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import router
from bench.load import KEY, Dialect, LoadError, answers
from bench.measure import memory_mib

ROOT = Path(__file__).parents[1]
OUT = ROOT / "bench" / "out"
TESTED_CORE, LOAD_CORE = 0, 1
_START_S = 60
_STOP_S = 15
_POLL_S = 0.005
# What is done once after a start (probes, first collections) is not idling.
_SETTLE_S = 1.0


class NotStarted(LoadError):
    """A proxy did not answer; the message says what it said instead."""


@dataclass(frozen=True)
class Running:
    """A started process and what it took to start."""

    pid: int
    port: int
    dialect: Dialect
    start_s: float
    idle_mib: float


@dataclass(frozen=True)
class Proxy:
    """Something to measure. `files` are written before, `command` may name their places.

    In both, {out} is a directory of its own that is empty at its start, {port}, {side_port} and
    {upstream} are ports. With `prints_port` it chooses its port itself, and prints it as a line.
    """

    name: str
    version: str
    command: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    dialect: Dialect = field(default_factory=Dialect)
    prints_port: bool = False
    streams_max: int = 5_000

    @contextlib.contextmanager
    def up(self, upstream_port: int) -> Iterator[Running]:
        """Start it on its core, wait for its first answer, and end it whatever happens."""
        out = OUT / self.name.replace(", ", "-")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        ports = {"port": free_port(), "side_port": free_port(), "upstream": upstream_port}
        places = {"out": str(out)} | {name: str(port) for name, port in ports.items()}
        for name, text in self.files.items():
            (out / name).write_text(_filled(text, places))
        command = [_filled(part, places) for part in self.command]
        environ = {**os.environ, **self.environ}
        log = out / "log"
        started = time.monotonic()
        with (
            log.open("wb") as file,
            pinned_process(command, TESTED_CORE, log=file.fileno(), environ=environ) as process,
        ):
            port = None if self.prints_port else ports["port"]
            while port is None or not answers(port, self.dialect):
                if process.poll() is not None or time.monotonic() > started + _START_S:
                    raise NotStarted(f"{self.name} did not answer; it said: {_last_words(log)}")
                time.sleep(_POLL_S)
                port = port or _printed_port(log)
            start_s = time.monotonic() - started
            time.sleep(_SETTLE_S)
            yield Running(process.pid, port, self.dialect, start_s, memory_mib(process.pid))


def _filled(text: str, places: Mapping[str, str]) -> str:
    for name, value in places.items():
        text = text.replace("{" + name + "}", value)
    return text


def _printed_port(log: Path) -> int | None:
    lines = log.read_text(errors="replace").split("\n")[:-1]
    return next((int(line) for line in lines if line.isdigit()), None)


def _last_words(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").split())[-400:] or "nothing"


@contextlib.contextmanager
def pinned_process(
    command: list[str],
    core: int,
    *,
    log: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A process on one core; what it says goes to the log, or is piped. Always ended."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if log is None else log,
            stderr=subprocess.DEVNULL if log is None else log,
            text=True,
        )
    finally:
        os.sched_setaffinity(0, before)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- Rungway --------------------------------------------------------------------------------------

# Limits that are counted on every call and never reached.
LIMITS = {
    "usd_per_day": 1_000_000.0,
    "requests_per_minute": 1_000_000_000,
    "tokens_per_minute": 1_000_000_000,
}

_ON = """
[server]
port = {port}
workers = {workers}
keepalive_s = {keepalive_s}

[state]
url = "{state}"

[cache]
memory_mib = {cache_mib}

[backends.fake]
kind = "openai"
url = "http://127.0.0.1:{upstream}"

{ladders}

[keys.bench]
sha256 = "{sha256}"
ladders = ["*"]
[keys.bench.limits]
{limits}
"""

_BARE = """
[server]
port = {port}
auth = "open"

[state]
url = "memory://"

[cache]
memory_mib = 0

[backends.fake]
kind = "openai"
url = "http://127.0.0.1:{upstream}"

[ladders.assistant]
task = "chat"
[[ladders.assistant.rungs]]
backend = "fake"
model = "bench"
max_in_flight = 20000

[ladders.embed]
task = "embeddings"
[[ladders.embed.rungs]]
backend = "fake"
model = "bench"
max_in_flight = 20000
"""

# What a configuration allows in one ladder.
_RUNGS_MAX = 64
_COMMAND = (sys.executable, "-m", "router", "serve", "--config", "{out}/rungway.toml")


def rungway(
    name: str = "rungway",
    *,
    workers: int = 1,
    rungs: int = 1,
    cache_mib: int = 64,
    keepalive_s: int = 15,
    state: str = "sqlite://{out}/state.db",
) -> Proxy:
    """With all that a call can cost: a limited key, prices, the cache, the log, a state on disk."""
    text = _ON
    for place, value in {
        "workers": str(workers),
        "keepalive_s": str(keepalive_s),
        "state": state,
        "cache_mib": str(cache_mib),
        "ladders": _ladders(rungs),
        "sha256": hashlib.sha256(KEY.encode()).hexdigest(),
        "limits": "\n".join(f"{limit} = {value}" for limit, value in LIMITS.items()),
    }.items():
        text = text.replace("{" + place + "}", value)
    return Proxy(name, _version(), _COMMAND, {"rungway.toml": text})


def rungway_bare() -> Proxy:
    """Open to all, without limits, prices, cache or a state on disk."""
    return Proxy("rungway, bare", _version(), _COMMAND, {"rungway.toml": _BARE})


def with_key(proxy: Proxy, key: str) -> Proxy:
    headers = {"authorization": f"Bearer {key}"}
    return replace(proxy, dialect=replace(proxy.dialect, headers=headers))


def _ladders(rungs: int) -> str:
    """So many rungs in all, the most that fit in the ladder that is called."""
    lines = ["[ladders.embed]", 'task = "embeddings"', *_rung("embed", "bench", 0.02, 0)]
    for number in range(rungs):
        ladder = "assistant" if number < _RUNGS_MAX else f"other{number // _RUNGS_MAX}"
        if number % _RUNGS_MAX == 0:
            lines += [f"[ladders.{ladder}]", 'task = "chat"']
        lines += _rung(ladder, "bench" if number == 0 else f"bench-{number}", 0.13, 0.40)
    return "\n".join(lines)


def _rung(ladder: str, model: str, input_usd: float, output_usd: float) -> list[str]:
    return [
        f"[[ladders.{ladder}.rungs]]",
        'backend = "fake"',
        f'model = "{model}"',
        "max_in_flight = 20000",
        f"usd_per_mtok = {{ input = {input_usd}, output = {output_usd} }}",
    ]


def _version() -> str:
    packages = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("aiohttp", "uvloop", "orjson")
    )
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{router.__version__} ({packages}, Python {python})"
