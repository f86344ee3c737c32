"""Callers that wrk cannot play: some at a gentle pace, timed, and thousands that hold a stream.

`python -m bench.clients PORT COUNT DIALECT` opens so many quiet streams, prints how many have their
first event, and holds them until its input ends.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, cast

import uvloop

from bench.load import QUIET_STREAM, Dialect, LoadError, Workload, headers_for

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_OPENED_AT_ONCE = 100
_ANSWER_S = 30


def request_bytes(workload: Workload, dialect: Dialect) -> bytes:
    body = workload.one_body(dialect)
    headers = {"host": "127.0.0.1", **headers_for(dialect), "content-length": str(len(body))}
    lines = [f"POST {workload.path(dialect)} HTTP/1.1"]
    lines += [f"{name}: {text}" for name, text in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


class Caller(asyncio.Protocol):
    """One connection, one call at a time. `is_enough` says when what has come is the answer."""

    transport: asyncio.Transport

    def __init__(self, is_enough: Callable[[bytes], bool]) -> None:
        self._is_enough = is_enough
        self._came = b""
        self._waiter: asyncio.Future[float] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._waiter is None:
            return
        self._came += data
        if self._is_enough(self._came):
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(LoadError(f"the connection was closed after {self._came[:300]!r}"))

    async def call(self, request: bytes) -> float:
        """Seconds until the answer was there. Raises LoadError where it is not a 200."""
        self._came = b""
        self._waiter = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        self.transport.write(request)
        async with asyncio.timeout(_ANSWER_S):
            ended = await self._waiter
        if not self._came.startswith(b"HTTP/1.1 200"):
            raise LoadError(f"answered {self._came[:300]!r}")
        return ended - started

    def _end(self, error: LoadError | None) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is None or waiter.done():
            return
        if error is None:
            waiter.set_result(time.perf_counter())
        else:
            waiter.set_exception(error)


def is_whole(came: bytes) -> bool:
    """An answer with a length or in chunks."""
    end = came.find(b"\r\n\r\n")
    if end < 0:
        return False
    length = _LENGTH.search(came, 0, end)
    if length is None:
        return came.endswith(b"0\r\n\r\n")
    return len(came) >= end + 4 + int(length[1])


def has_event(came: bytes) -> bool:
    return b"data: " in came or not came.startswith(b"HTTP/1.1 200")


async def connect(port: int, is_enough: Callable[[bytes], bool]) -> Caller:
    loop = asyncio.get_running_loop()
    _, caller = await loop.create_connection(lambda: Caller(is_enough), "127.0.0.1", port)
    return caller


# --- a gentle pace --------------------------------------------------------------------------------


def latencies(
    upstream: tuple[int, Dialect],
    proxy: tuple[int, Dialect],
    workload: Workload,
    per_s: float,
    for_s: float,
) -> tuple[list[float], list[float]]:
    """Seconds of calls straight to the upstream and of calls through the proxy, by turns.

    Both at the same pace in the same seconds, so that whatever else the machine does is in both.
    """
    return uvloop.run(_latencies(upstream, proxy, workload, per_s, for_s))


async def _latencies(
    upstream: tuple[int, Dialect],
    proxy: tuple[int, Dialect],
    workload: Workload,
    per_s: float,
    for_s: float,
) -> tuple[list[float], list[float]]:
    lanes = [_Lane(port, dialect, workload) for port, dialect in (upstream, proxy)]
    loop = asyncio.get_running_loop()
    pause_s = 1 / per_s / len(lanes)
    started = loop.time()
    async with asyncio.TaskGroup() as group:
        for number in range(int(for_s / pause_s)):
            await asyncio.sleep(max(0, started + number * pause_s - loop.time()))
            lane = lanes[number % len(lanes)]
            group.create_task(lane.call())
    for lane in lanes:
        lane.close()
    return lanes[0].seconds, lanes[1].seconds


class _Lane:
    """Calls to one port, over as few connections as there are calls at once."""

    def __init__(self, port: int, dialect: Dialect, workload: Workload) -> None:
        self._port, self._dialect, self._workload = port, dialect, workload
        self._idle: list[Caller] = []
        self.seconds: list[float] = []

    async def call(self) -> None:
        fresh = not self._idle
        caller = await connect(self._port, is_whole) if fresh else self._idle.pop()
        seconds = await caller.call(request_bytes(self._workload, self._dialect))
        # A new connection's first call pays for the proxy's own new connection.
        if not fresh:
            self.seconds.append(seconds)
        self._idle.append(caller)

    def close(self) -> None:
        for caller in self._idle:
            caller.transport.abort()


# --- thousands that hold a stream -----------------------------------------------------------------


async def hold(port: int, count: int, dialect: Dialect) -> None:
    callers: list[Caller] = []
    left = iter(range(count))

    async def open_some() -> None:
        for _ in left:
            caller = await connect(port, has_event)
            await caller.call(request_bytes(QUIET_STREAM, dialect))
            callers.append(caller)

    async with asyncio.TaskGroup() as group:
        for _ in range(_OPENED_AT_ONCE):
            group.create_task(open_some())
    print(len(callers), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for caller in callers:
        caller.transport.abort()


def arguments(port: int, count: int, dialect: Dialect) -> list[str]:
    """What this module is started with."""
    return ["-m", "bench.clients", str(port), str(count), json.dumps(asdict(dialect))]


def _dialect(text: str) -> Dialect:
    fields: dict[str, Any] = json.loads(text)
    return Dialect(**fields)


if __name__ == "__main__":
    uvloop.run(hold(int(sys.argv[1]), int(sys.argv[2]), _dialect(sys.argv[3])))
