"""aiohttp's server comes when the first connection needs it: nobody else waits for it, and whoever
does is served, or told, in the end.

Its import is held up where Python looks for the module, as by a slow disk or a broken one.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import orjson
import pytest

from router.api import server as server_module
from router.api.front import Front
from router.api.server import Server
from tests.api.front.test_bytes import CHUNKED, GET, PLAIN, answer, opened, server_of, settled
from tests.fakes.wire import Wire

MODULE = "router.api.aiohttp_server"


class Disk(MetaPathFinder):
    """Finds the module when it may, or fails as often as it is told."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.failures = 0
        self.asked_by: list[threading.Thread] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == MODULE:
            self.asked_by.append(threading.current_thread())
            self.go.wait(30)
            if self.failures:
                self.failures -= 1
                raise OSError("too many open files")
        return None


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    one = Disk()
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setattr(sys, "meta_path", [one, *sys.meta_path])
    yield one
    one.failures = 0
    one.go.set()
    # A thread that still imports it ends before the next test.
    importlib.import_module(MODULE)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def is_answered(wire: Wire) -> bool:
    return b"200 OK" in wire.sent


def error_of(wire: Wire) -> object:
    head, _, body = wire.sent.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 500 ")
    assert b"\r\nConnection: close\r\n" in head
    return orjson.loads(body)["error"]["code"]


async def test_plain_requests_are_served_while_others_wait(disk: Disk) -> None:
    server = server_of()
    early = opened(server)
    early.feed(PLAIN)
    await settled()
    waiting = [opened(server) for _ in range(20)]
    for at, wire in enumerate(waiting):
        wire.feed(CHUNKED.replace(b"/chat", b"/%d" % at))
        await settled()
        assert not wire.is_reading(), "what else it has to say stays in its socket"
    for wire in (early, opened(server)):
        before = wire.sent.count(b"200 OK")
        for data in (GET, PLAIN):
            wire.feed(data)
            await settled()
        assert wire.sent.count(b"200 OK") == before + 2
        assert isinstance(wire.get_protocol(), Front)
    assert not any(wire.sent for wire in waiting)
    assert len(server.connections) == 22
    disk.go.set()
    await until(lambda: all(map(is_answered, waiting)))
    for at, wire in enumerate(waiting):
        assert b'"POST /%d"' % at in wire.sent
        assert wire.is_reading()
        wire.feed(PLAIN)
        await settled()
        assert wire.sent.count(b"200 OK") == 2
    assert len(server.connections) == 22
    assert len(disk.asked_by) == 1
    assert threading.main_thread() not in disk.asked_by
    # The next one does not wait.
    assert b"200 OK" in await answer(server, [CHUNKED])
    await server.shutdown(1)


async def test_who_waits_counts_as_all_others_do(disk: Disk) -> None:
    server = server_of(connections_max=3)
    first, second, third = (opened(server) for _ in range(3))
    for wire in (first, second):
        wire.feed(CHUNKED)
    await settled()
    more = opened(server)
    await settled()
    assert more.is_closing()
    assert not third.is_closing()
    disk.go.set()
    await until(lambda: is_answered(first) and is_answered(second))
    more = opened(server)
    await settled()
    assert more.is_closing()
    assert len(server.connections) == 3
    await server.shutdown(1)


async def test_who_leaves_meanwhile_is_not_served(disk: Disk) -> None:
    server = server_of()
    leaving, staying = opened(server), opened(server)
    for wire in (leaving, staying):
        wire.feed(CHUNKED)
    leaving.leave()
    await settled()
    disk.go.set()
    await until(lambda: is_answered(staying))
    assert leaving.sent == b""
    assert server.connections == [staying.get_protocol()]
    await server.shutdown(1)


async def test_a_failed_import_is_told_and_the_next_one_tries_again(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.failures = 2
    server = server_of()
    for failed in (1, 2):
        disk.go.clear()
        waiting = [opened(server) for _ in range(3)]
        for wire in waiting:
            wire.feed(CHUNKED)
        await settled()
        disk.go.set()
        await until(lambda: all(wire.is_closing() for wire in waiting))  # noqa: B023
        assert [error_of(wire) for wire in waiting] == ["internal_error"] * 3
        told = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert [str(record.exc_info and record.exc_info[1]) for record in told] == (
            ["too many open files"] * failed
        )
    assert server.connections == []
    assert b"200 OK" in await answer(server, [PLAIN])
    wire = opened(server)
    wire.feed(CHUNKED)
    await until(lambda: is_answered(wire))
    await server.shutdown(1)


async def test_an_import_without_end_is_not_waited_for_without_end(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = server_of()
    wire = opened(server)
    with monkeypatch.context() as limits:
        limits.setattr(server_module, "_IMPORT_S_MAX", 0.05)
        wire.feed(CHUNKED)
        await until(wire.is_closing)
    assert error_of(wire) == "internal_error"
    disk.go.set()
    other = opened(server)
    other.feed(CHUNKED)
    await until(lambda: is_answered(other))
    await server.shutdown(1)


async def test_who_waits_is_served_before_the_end(disk: Disk) -> None:
    server = server_of()
    waiting, idle = opened(server), opened(server)
    waiting.feed(CHUNKED)
    await settled()
    server.pre_shutdown()
    await settled()
    assert idle.is_closing()
    assert not waiting.is_closing()
    ending = asyncio.ensure_future(server.shutdown(20))
    await settled()
    disk.go.set()
    await ending
    await until(waiting.is_closing)
    assert is_answered(waiting)
    assert server.connections == []


async def test_the_end_does_not_wait_for_an_import_without_end(disk: Disk) -> None:
    server: Server = server_of()
    wire = opened(server)
    wire.feed(CHUNKED)
    await settled()
    await server.shutdown(0.05)
    await settled()
    assert wire.is_closing()
    assert wire.sent == b""
    # Its thread would hold the loop's end.
    disk.go.set()
