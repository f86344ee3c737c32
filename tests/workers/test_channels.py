"""The lines between the parent and its workers: whole messages, nothing unbounded, clean ends."""

from __future__ import annotations

import asyncio
import selectors
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest

from router.core.frames import FRAME_BYTES_MAX, FrameReader, frame
from router.flow.events import Events, Gathered
from router.types import Json
from router.workers.channels import Channel, Channels
from router.workers.line import UNSENT_BYTES_MAX, Line


@pytest.fixture
def selector() -> Iterator[selectors.BaseSelector]:
    with selectors.DefaultSelector() as found:
        yield found


@pytest.fixture
def channels(selector: selectors.BaseSelector) -> Iterator[Channels]:
    made = Channels(selector)
    yield made
    made.close_ours()


def only(selector: selectors.BaseSelector) -> Channel:
    ((_, key),) = selector.get_map().items()
    assert isinstance(key.data, Channel)
    return key.data


def test_messages_go_both_ways(channels: Channels, selector: selectors.BaseSelector) -> None:
    with channels.open(7) as theirs:
        channels.send(7, {"is": "stop"})
        channels.send(8, {"is": "for nobody"})
        assert FrameReader().feed(theirs.recv(1000)) == [{"is": "stop"}]
        theirs.send(frame({"is": "ready"}) + frame({"is": "event"})[:5])
        assert channels.read(only(selector)) == [{"is": "ready"}]
        theirs.send(frame({"is": "event"})[5:])
        assert channels.read(only(selector)) == [{"is": "event"}]
        assert channels.read(only(selector)) == []


def test_what_a_worker_reads_late_comes_whole(
    channels: Channels, selector: selectors.BaseSelector
) -> None:
    big = {"is": "event", "payload": "x" * (4 << 20)}
    with channels.open(0) as theirs:
        channels.send(0, big)
        channel, reader = only(selector), FrameReader()
        assert selector.get_key(channel.end).events & selectors.EVENT_WRITE
        found: list[Json] = []
        while not found:
            found = reader.feed(theirs.recv(1 << 20))
            channels.write(channel)
        assert found == [big]
        assert selector.get_key(channel.end).events == selectors.EVENT_READ


def test_a_worker_that_reads_nothing_is_cut_off(
    channels: Channels, selector: selectors.BaseSelector
) -> None:
    piece = {"is": "event", "payload": "x" * (FRAME_BYTES_MAX - 100)}
    with channels.open(0) as theirs:
        channel = only(selector)
        for _ in range(UNSENT_BYTES_MAX // FRAME_BYTES_MAX + 2):
            channels.send(0, piece)
        assert not channel.is_open
        assert not selector.get_map()
        assert len(channel.unsent) < UNSENT_BYTES_MAX + FRAME_BYTES_MAX + 5
        theirs.setblocking(True)
        while theirs.recv(1 << 20):
            pass


def test_a_message_that_is_too_large_is_not_sent(
    channels: Channels, caplog: pytest.LogCaptureFixture
) -> None:
    with channels.open(0) as theirs:
        channels.send(0, {"is": "event", "payload": "x" * FRAME_BYTES_MAX})
        channels.send(0, {"is": "stop"})
        assert FrameReader().feed(theirs.recv(1000)) == [{"is": "stop"}]
    assert "is not sent" in caplog.text


@pytest.mark.parametrize("last", [b"", b"\xff\xff\xff\xff"])
def test_a_line_that_ends_or_speaks_nonsense_is_cut(
    channels: Channels, selector: selectors.BaseSelector, last: bytes
) -> None:
    with channels.open(3) as theirs:
        channel = only(selector)
        theirs.send(frame({"is": "failed"}) + frame({"is": "event"}))
        theirs.send(last)
        theirs.shutdown(socket.SHUT_WR)
        if not last:
            assert channels.read_out(3) == [{"is": "failed"}, {"is": "event"}]
        else:
            assert channels.read_out(3) == []
        assert not channel.is_open
        channels.forget(3)
        channels.send(3, {"is": "stop"})


class Parent:
    """A parent's end of one line, by hand."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._reader = FrameReader()
        self._found: list[Json] = []

    async def heard(self) -> Json:
        while not self._found:
            data = await asyncio.get_running_loop().sock_recv(self._end, 1 << 20)
            assert data, "the line has ended"
            self._found += self._reader.feed(data)
        return self._found.pop(0)

    def close(self) -> None:
        self._end.close()

    async def say(self, message: Json) -> None:
        await asyncio.get_running_loop().sock_sendall(self._end, frame(message))


@dataclass
class Wired:
    """A worker's end of a line on the loop, and all around it."""

    line: Line
    events: Events
    parent: Parent
    commands: list[Json]
    lost: asyncio.Event


@pytest.fixture
async def wired() -> AsyncIterator[Wired]:
    ours, theirs = socket.socketpair()
    events, commands, lost = Events(), list[Json](), asyncio.Event()
    events.answers("status", lambda payload: {"echo": payload})
    line = Line(events, 3, commands.append, lost.set)
    await asyncio.get_running_loop().create_unix_connection(lambda: line, sock=theirs)
    events.outlet = line
    with ours:
        yield Wired(line, events, Parent(ours), commands, lost)
    await asyncio.wait_for(lost.wait(), 5)


async def test_who_gathers_hears_all_and_no_later_than_the_limit(wired: Wired) -> None:
    events, parent = wired.events, wired.parent
    asking = asyncio.ensure_future(events.gather("status", {"x": 1}, limit_s=5))
    ask = await parent.heard()
    assert (ask["is"], ask["kind"], ask["payload"], "own" in ask) == (
        "ask",
        "status",
        {"x": 1},
        False,
    )
    await parent.say({"is": "answer", "id": ask["id"], "from": 1, "payload": {"a": 1}})
    await parent.say({"is": "asked", "id": ask["id"], "others": [1, 2], "kept": []})
    await parent.say({"is": "answer", "id": ask["id"], "from": 2, "payload": {"b": 2}})
    assert await asking == Gathered([{"echo": {"x": 1}}, {"a": 1}, {"b": 2}], 3)
    # Nobody answers, and what comes too late is for nobody.
    assert await events.gather("status", {"x": 2}, limit_s=0.01) == Gathered(
        [{"echo": {"x": 2}}], 3
    )
    late = await parent.heard()
    await parent.say({"is": "answer", "id": late["id"], "from": 1, "payload": {}})
    await parent.say({"is": "asked", "id": late["id"], "others": [1], "kept": []})


async def test_what_the_parent_keeps_goes_with_the_question(wired: Wired) -> None:
    events, parent = wired.events, wired.parent
    events.answers("metrics", lambda _: {"families": []})
    asking = asyncio.ensure_future(events.gather("metrics", {}, limit_s=0.1))
    ask = await parent.heard()
    assert ask["own"] == {"families": []}
    last = [[1, {"n": 1}], [2, {"n": 2}], [-1, {"n": "the parent's own"}]]
    await parent.say({"is": "asked", "id": ask["id"], "others": [1, 2], "kept": last})
    await parent.say({"is": "answer", "id": ask["id"], "from": 2, "payload": {"n": 3}})
    gathered = await asking
    assert gathered.answers == [{"families": []}, {"n": 3}]
    assert gathered.kept == [{"n": 1}, {"n": "the parent's own"}], "who answered needs no stand-in"


async def test_a_worker_answers_and_hears_and_obeys(wired: Wired) -> None:
    events, parent = wired.events, wired.parent
    heard: list[Json] = []
    events.on("board", heard.append)
    await parent.say({"is": "event", "kind": "board", "payload": {"a": 1}})
    await parent.say({"is": "event", "kind": "of a later version", "payload": {}})
    await parent.say({"is": "stop"})
    await parent.say({"is": "ask", "id": 9, "from": 2, "kind": "status", "payload": {"b": 2}})
    told = {"is": "answer", "to": 2, "id": 9, "kind": "status", "payload": {"echo": {"b": 2}}}
    assert await parent.heard() == told
    assert heard == [{"a": 1}]
    assert wired.commands == [{"is": "stop"}]
    events.publish("board", {"c": 3})
    assert await parent.heard() == {"is": "event", "kind": "board", "payload": {"c": 3}}
    parent.close()
    await asyncio.wait_for(wired.lost.wait(), 5)
    assert await events.gather("status", {}) == Gathered([{"echo": {}}], 3)


async def test_a_flood_of_questions_is_answered_from_here(wired: Wired) -> None:
    events, parent = wired.events, wired.parent
    asking = [asyncio.ensure_future(events.gather("status", {}, limit_s=5)) for _ in range(65)]
    assert await asking[64] == Gathered([{"echo": {}}], 3)
    for _ in range(64):
        ask = await parent.heard()
        await parent.say({"is": "asked", "id": ask["id"], "others": [], "kept": []})
    await asyncio.gather(*asking)


async def test_a_parent_that_reads_nothing_is_given_up(wired: Wired) -> None:
    for _ in range(UNSENT_BYTES_MAX // FRAME_BYTES_MAX + 2):
        wired.events.publish("board", {"x": "y" * (FRAME_BYTES_MAX - 100)})
    await asyncio.wait_for(wired.lost.wait(), 5)
    wired.line.send({"is": "into the void"})


async def test_alone_one_gathers_from_oneself() -> None:
    events = Events()
    events.answers("status", lambda payload: payload)
    events.publish("board", {})
    assert await events.gather("status", {"a": 1}) == Gathered([{"a": 1}])
