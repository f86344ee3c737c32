"""`make soak`: minutes of everything that goes wrong at once, and whether memory or files grow.

Many callers at once, each again and again with one of: a plain call, a stream read to its end, a
client that leaves before its answer or in the middle of a stream, calls that churn a small cache
and calls that hit it, embeddings alone and by the hundred, a ladder whose first rung fails in every
way there is, a key that has run out, one that is unknown, a body that is no JSON, scrapes of the
metrics. The seed is fixed, so that two soaks ask for the same. An answer that
its kind of call should not have, or an error in the log, fails the soak too.

Memory and files are read every few seconds. After a warm-up, in which caches and pools fill, a line
is fitted through them: the soak fails where its slope is above nought beyond the noise (the
interval is widened for readings that follow each other, since neighbours are alike) and what that
would come to in an hour is more than a small amount.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import uvloop

from bench.load import KEY, Dialect, LoadError, headers_for
from bench.measure import files_open, memory_mib
from bench.proxies import (
    LOAD_CORE,
    OUT,
    TESTED_CORE,
    Proxy,
    Running,
    pinned_process,
    rungway,
)

_CALLERS = 48
_SAMPLE_S = 3.0
_WARM_SHARE = 0.35
_ANSWER_S = 30.0
_PAUSE_S = 0.01
# What an hour's growth may come to before it counts: pools and tables move by less.
_MEMORY_MIB_AN_HOUR = 6.0
_FILES_AN_HOUR = 12.0
# Two sides of a normal distribution at 99 %.
_SIGMAS = 2.58

_NAME = "rungway-soak"
LOG = OUT / _NAME / "log"

_SPENT_KEY = "rungway-soak-spent-key"
_TROUBLE = """
[ladders.shaky]
task = "chat"
[[ladders.shaky.rungs]]
backend = "fake"
model = "faulty"
usd_per_mtok = { input = 0.05, output = 0.10 }
[[ladders.shaky.rungs]]
backend = "fake"
model = "bench"
usd_per_mtok = { input = 0.13, output = 0.40 }

[ladders.broken]
task = "chat"
[[ladders.broken.rungs]]
backend = "fake"
model = "faulty"
usd_per_mtok = { input = 0.05, output = 0.10 }

[keys.spent]
sha256 = "{spent}"
ladders = ["*"]
[keys.spent.limits]
usd_per_day = 0.0001
requests_per_minute = 30
tokens_per_minute = 20000
concurrent = 2
"""


# What each kind may be answered; 0: the caller left, or its connection was closed before an answer.
# Of the failing ladders a rung may be closed or its queue be full at the moment.
_EXPECTED = {
    "leaves": {0},
    "failing rung": {200},
    "failing rung, stream": {200},
    "no rung left": {429, 502, 503, 504},
    "spent key": {200, 429},
    "unknown key": {401},
    "no JSON": {400},
}


def soaked() -> Proxy:
    proxy = rungway(_NAME, cache_mib=8)
    spent = hashlib.sha256(_SPENT_KEY.encode()).hexdigest()
    text = proxy.files["rungway.toml"] + _TROUBLE.replace("{spent}", spent)
    files = {"rungway.toml": text}
    return Proxy(proxy.name, proxy.version, proxy.command, files, dialect=proxy.dialect)


# --- the callers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """One request. `leave_after_s`: when the client goes away; `leave_at`: at how many bytes."""

    kind: str
    body: bytes
    path: str = "/v1/chat/completions"
    method: str = "POST"
    key: str = KEY
    leave_after_s: float | None = None
    leave_at: int | None = None


class Asks:
    """What a caller does next."""

    def __init__(self, seed: int) -> None:
        self._rand = random.Random(seed)
        self._numbers = itertools.count()

    def next(self) -> Ask:
        kinds = (
            *(self._plain, self._plain, self._cached, self._cached, self._stream, self._stream),
            *(self._leaving, self._leaving, self._left_stream, self._left_stream),
            *(self._embedding, self._embeddings, self._shaky, self._shaky, self._broken),
            *(self._spent, self._unknown, self._nonsense, self._scrape),
        )
        return self._rand.choice(kinds)()

    def _chat(self, **settings: object) -> bytes:
        prompt = str(settings.pop("prompt", f"call {next(self._numbers)}: {'tell me more. ' * 20}"))
        model = settings.pop("model", "assistant")
        messages = [{"role": "user", "content": prompt}]
        return json.dumps(
            {"model": model, "messages": messages, "max_tokens": 256, **settings}
        ).encode()

    def _streamed(self, events: int, pause_ms: int, **settings: object) -> bytes:
        number = next(self._numbers)
        prompt = f"call {number}, events={events} pause_ms={pause_ms}: go on"
        return self._chat(prompt=prompt, stream=True, **settings)

    def _plain(self) -> Ask:
        return Ask("plain", self._chat())

    def _cached(self) -> Ask:
        """Half of them again and again, half of them new: the cache is full after a while."""
        if self._rand.random() < 0.5:
            prompt = f"one of a few: {self._rand.randrange(200)}"
            return Ask("hit", self._chat(prompt=prompt, temperature=0))
        return Ask("churn", self._chat(temperature=0))

    def _stream(self) -> Ask:
        kept = {"temperature": 0} if self._rand.random() < 0.5 else {}
        return Ask("stream", self._streamed(self._rand.randrange(1, 20), 5, **kept))

    def _leaving(self) -> Ask:
        return Ask("leaves", self._chat(), leave_after_s=self._rand.random() * 0.01)

    def _left_stream(self) -> Ask:
        body = self._streamed(200, 10)
        return Ask("leaves a stream", body, leave_at=self._rand.randrange(1, 20_000))

    def _embedding(self) -> Ask:
        return self._embed("embedding", f"one rung higher {next(self._numbers)}")

    def _embeddings(self) -> Ask:
        inputs = [f"rung {next(self._numbers)}" for _ in range(self._rand.randrange(2, 200))]
        return self._embed("embeddings", inputs)

    def _embed(self, kind: str, inputs: str | list[str]) -> Ask:
        body = {"model": "embed", "input": inputs, "encoding_format": "base64"}
        return Ask(kind, json.dumps(body).encode(), "/v1/embeddings")

    def _shaky(self) -> Ask:
        if self._rand.random() < 0.5:
            return Ask("failing rung", self._chat(model="shaky"))
        return Ask("failing rung, stream", self._streamed(5, 5, model="shaky"))

    def _broken(self) -> Ask:
        return Ask("no rung left", self._chat(model="broken"))

    def _spent(self) -> Ask:
        return Ask("spent key", self._chat(), key=_SPENT_KEY)

    def _unknown(self) -> Ask:
        return Ask("unknown key", self._chat(), key=f"no-such-key-{next(self._numbers)}")

    def _nonsense(self) -> Ask:
        return Ask("no JSON", b'{"model": "assistant", "messages": [' + b"[" * 100)

    def _scrape(self) -> Ask:
        return Ask("metrics", b"", "/metrics", "GET")


class Soak:
    """Callers until the time is over. `statuses` counts what they were answered, by kind."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self.statuses: Counter[tuple[str, int]] = Counter()

    async def run(self, until: float) -> None:
        async with asyncio.TaskGroup() as group:
            for seed in range(_CALLERS):
                group.create_task(self._caller(Asks(seed), until))

    async def _caller(self, asks: Asks, until: float) -> None:
        """On one connection while it lasts, as SDKs do."""
        reader, writer = None, None
        while time.monotonic() < until:
            ask = asks.next()
            status, is_over = 0, True
            # A connection that the daemon closed in between is no failure; it is made anew.
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                if reader is None or writer is None:
                    port = self._running.port
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                async with asyncio.timeout(_ANSWER_S):
                    status, is_over = await self._ask(reader, writer, ask)
            self.statuses[ask.kind, status] += 1
            if is_over and writer is not None:
                writer.transport.abort()
                reader, writer = None, None
            await asyncio.sleep(_PAUSE_S)
        if writer is not None:
            writer.transport.abort()

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ask: Ask
    ) -> tuple[int, bool]:
        """The status (0: the caller left before), and whether the connection is of no more use."""
        dialect = Dialect(headers={"authorization": f"Bearer {ask.key}"})
        headers = {"host": "127.0.0.1", **headers_for(dialect)}
        headers["content-length"] = str(len(ask.body))
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"{ask.method} {ask.path} HTTP/1.1\r\n{head}\r\n".encode() + ask.body)
        if ask.leave_after_s is not None:
            await asyncio.sleep(ask.leave_after_s)
            return 0, True
        head_bytes = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head_bytes.split(b" ", 2)[1])
        left = math.inf if ask.leave_at is None else ask.leave_at
        if b"transfer-encoding: chunked" in head_bytes:
            while size := int(await reader.readuntil(b"\r\n"), 16):
                await reader.readexactly(size + 2)
                left -= size
                if left < 0:
                    return status, True
            await reader.readexactly(2)
        else:
            length = head_bytes.partition(b"content-length:")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(length or 0))
        return status, b"connection: close" in head_bytes


# --- what grows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slope:
    """Units a second, with the ends of its 99 % interval."""

    value: float
    low: float
    high: float

    def an_hour(self) -> str:
        return (
            f"{self.value * 3600:+.2f} an hour"
            f" (99 %: {self.low * 3600:+.2f} to {self.high * 3600:+.2f})"
        )


def slope(times: Sequence[float], values: Sequence[float]) -> Slope:
    """The line of least squares; its error as if there were fewer readings, by how alike
    neighbours are (the residuals' first autocorrelation)."""
    count = len(times)
    mean_time, mean_value = sum(times) / count, sum(values) / count
    spread = sum((time - mean_time) ** 2 for time in times)
    pairs = zip(times, values, strict=True)
    value = sum((time - mean_time) * (y - mean_value) for time, y in pairs) / spread
    residuals = [
        y - mean_value - value * (time - mean_time) for time, y in zip(times, values, strict=True)
    ]
    squares = sum(residual**2 for residual in residuals)
    products = sum(one * other for one, other in itertools.pairwise(residuals))
    alike = min(0.95, max(0.0, products / squares if squares else 0.0))
    counted = max(3.0, count * (1 - alike) / (1 + alike))
    error = math.sqrt(squares / count / spread * count / max(1.0, counted - 2))
    return Slope(value, value - _SIGMAS * error, value + _SIGMAS * error)


@dataclass(frozen=True)
class Sample:
    at_s: float
    memory_mib: float
    files: int


async def sampled(running: Running, soak: Soak, for_s: float) -> list[Sample]:
    started = time.monotonic()
    samples: list[Sample] = []

    async def sample() -> None:
        while (at_s := time.monotonic() - started) < for_s:
            memory, files = memory_mib(running.pid), files_open(running.pid)
            samples.append(Sample(at_s, memory, files))
            if len(samples) % 20 == 1:
                calls = sum(soak.statuses.values())
                print(
                    f"{at_s:6.0f} s  {memory:7.1f} MiB  {files:5} files  {calls:9,} calls",
                    flush=True,
                )
            await asyncio.sleep(_SAMPLE_S)

    async with asyncio.TaskGroup() as group:
        group.create_task(sample())
        group.create_task(soak.run(started + for_s))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    for_s = parser.parse_args().minutes * 60
    if for_s < 20 * _SAMPLE_S:
        raise SystemExit("✗ at least a minute: fewer readings say nothing")
    if not {TESTED_CORE, LOAD_CORE} <= os.sched_getaffinity(0):
        raise SystemExit("✗ the soak needs two cores")
    os.sched_setaffinity(0, {LOAD_CORE})
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    upstream = [sys.executable, "-m", "bench.upstream", "0"]
    try:
        with pinned_process(upstream, LOAD_CORE) as process:
            assert process.stdout is not None
            with soaked().up(int(process.stdout.readline())) as running:
                soak = Soak(running)
                samples = uvloop.run(sampled(running, soak, for_s))
                time.sleep(_SAMPLE_S)
                after = Sample(for_s, memory_mib(running.pid), files_open(running.pid))
    except LoadError as error:
        raise SystemExit(f"✗ {error}") from None
    wrong = [*tell(samples, after, soak), *surprises(soak.statuses), *errors_logged()]
    if wrong:
        raise SystemExit("✗ " + "\n✗ ".join(wrong))
    print("→ neither memory nor files grew beyond noise")


def surprises(statuses: Mapping[tuple[str, int], int]) -> list[str]:
    return [
        f"{kind} was answered {status or 'nothing'}, {count} times"
        for (kind, status), count in statuses.items()
        if status not in _EXPECTED.get(kind, {200})
    ]


def errors_logged() -> list[str]:
    """Each kind of error once, by the last line of its trace."""
    found: Counter[str] = Counter()
    with LOG.open() as lines:
        for line in lines:
            if '"level":"error"' in line:
                said = json.loads(line)
                last = said.get("trace", "").strip().rpartition("\n")[2]
                found[f"{said['message']}: {last}" if last else said["message"]] += 1
    return [f"logged {count} times: {what}" for what, count in found.items()]


def tell(samples: Sequence[Sample], after: Sample, soak: Soak) -> list[str]:
    """Print what was seen; what grew."""
    by_kind: dict[str, list[str]] = {}
    for (kind, status), count in sorted(soak.statuses.items()):
        by_kind.setdefault(kind, []).append(f"{status or 'left'}: {count:,}")
    print("\nanswers by kind")
    for kind, counts in by_kind.items():
        print(f"  {kind:24}{', '.join(counts)}")
    warm = samples[round(len(samples) * _WARM_SHARE) :]
    times = [sample.at_s for sample in warm]
    memory = slope(times, [sample.memory_mib for sample in warm])
    files = slope(times, [float(sample.files) for sample in warm])
    print(f"\nafter a warm-up of {times[0]:.0f} s, {len(warm)} readings:")
    print(f"  memory, MiB   {memory.an_hour()}")
    print(f"  files         {files.an_hour()}")
    print(
        f"  at the first reading {samples[0].memory_mib:.1f} MiB, {samples[0].files} files; with"
        f" all callers gone {after.memory_mib:.1f} MiB, {after.files} files"
    )
    grown = []
    if memory.low > 0 and memory.value * 3600 > _MEMORY_MIB_AN_HOUR:
        grown.append("memory grew beyond noise")
    if files.low > 0 and files.value * 3600 > _FILES_AN_HOUR:
        grown.append("files grew beyond noise")
    return grown


if __name__ == "__main__":
    main()
