"""The front in the whole house, on real sockets: who is served by whom, who leaves, who is slow."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import orjson
import pytest

from router.api.front import Front
from tests.api.test_chat import GOOD, HI, STREAM
from tests.api.test_direct import Raw, opened, request
from tests.backends.rigs.openai import chunk
from tests.fakes.upstream import FakeUpstream, Reply, Request
from tests.house import House, ladder_of, open_house

KEYS = f'[keys.a]\nsha256 = "{hashlib.sha256(b"a-key").hexdigest()}"\n'


MODELS = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


def chunked(body: Any) -> bytes:
    data = orjson.dumps(body)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    return b"%bTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (head, len(data), data)


def by_front(house: House) -> list[bool]:
    return [isinstance(one, Front) for one in house.server.connections]


async def status_of(raw: Raw, data: bytes) -> int:
    return int((await raw.ask(data))[0].split()[1])


async def gone(house: House) -> None:
    async with asyncio.timeout(5):
        while house.server.connections:
            await asyncio.sleep(0)


async def test_one_connection_serves_all_and_changes_hands_once() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        raw = await opened(house)
        for _ in range(3):
            for data in (request("1.1"), request("1.1", stream=True), MODELS):
                assert await status_of(raw, data) == 200
        assert by_front(house) == [True]
        for data in (chunked(HI), request("1.1"), request("1.1", stream=True), MODELS):
            assert await status_of(raw, data) == 200
            assert by_front(house) == [False]
        raw.writer.close()
        await gone(house)


async def test_head_and_body_in_two_writes_are_the_fronts() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        raw = await opened(house)
        data = request("1.1")
        at = data.index(b"\r\n\r\n") + 4
        for _ in range(3):
            raw.writer.write(data[:at])
            async with asyncio.timeout(5):
                while not house.server.connections:
                    await asyncio.sleep(0)
            assert await status_of(raw, data[at:]) == 200
        assert by_front(house) == [True]
        raw.writer.close()


async def test_a_stranger_is_refused_before_a_large_body() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url, keys=KEYS)) as house:
        raw = await opened(house)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += b"Content-Length: 900000\r\n\r\n{"
        line, headers, body = await raw.ask(head)
        assert line.split()[1] == "401"
        assert headers["x-request-id"]
        assert orjson.loads(body)["error"]["code"] == "missing_api_key"
        raw.writer.write(b"x" * 899_999)
        assert await status_of(raw, head) == 401
        assert by_front(house) == [True]
        raw.writer.transport.abort()
        await gone(house)


async def test_a_slow_large_body_is_not_waited_for() -> None:
    async with FakeUpstream(GOOD) as up:
        async with open_house(ladder_of(up.url, server="body_s = 0.1")) as house:
            raw = await opened(house)
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            line, headers, _ = await raw.ask(head + b"Content-Length: 900000\r\n\r\n{")
            assert line.split()[1] == "408"
            assert headers["connection"] == "close"
            raw.writer.close()
            await gone(house)


async def test_too_large_a_body_is_refused_by_its_length() -> None:
    async with FakeUpstream(GOOD) as up:
        async with open_house(ladder_of(up.url, server="max_body_mib = 1")) as house:
            raw = await opened(house)
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            line, headers, _ = await raw.ask(head + b"Content-Length: 2000000\r\n\r\n{")
            assert line.split()[1] == "413"
            assert headers["connection"] == "close"
            raw.writer.write(b"x" * 1_999_999)
            assert await raw.reader.read() == b""
            raw.writer.close()
            await gone(house)


@pytest.mark.parametrize("kept", ["head", "body", "all"])
@pytest.mark.parametrize("how", ["abort", "close", "half"])
async def test_who_leaves_has_left_in_every_phase(kept: str, how: str) -> None:
    arrived = asyncio.Event()

    async def hang(one: Request, reply: Reply) -> None:
        arrived.set()
        await reply.client_left()
        reply.close()

    async with FakeUpstream(hang) as up, open_house(ladder_of(up.url)) as house:
        raw = await opened(house)
        data = request("1.1")
        raw.writer.write({"head": data[:30], "body": data[:-5], "all": data}[kept])
        async with asyncio.timeout(5):
            while not house.server.connections:
                await asyncio.sleep(0)
            if kept == "all":
                await arrived.wait()
        if how == "abort":
            raw.writer.transport.abort()
        elif how == "close":
            raw.writer.close()
        else:
            # Nobody can tell it from a close, and whoever pays wants the call to end.
            raw.writer.write_eof()
            assert await raw.reader.read() == b""
        await gone(house)
        if kept == "all":
            async with asyncio.timeout(5):
                await up.left.wait()
        if kept != "head":
            await house.idle()
            assert [line["error"] for line in house.lines] == ["client_left"]
        assert house.shared.observer.in_flight == 0
        raw.writer.close()


async def test_what_a_client_does_not_read_is_not_read_from_the_upstream() -> None:
    sent = 0

    async def pours(one: Request, reply: Reply) -> None:
        nonlocal sent
        await reply.start()
        while True:
            await reply.event(chunk({"content": "x" * 10_000}))
            sent += 1

    async with FakeUpstream(pours) as up:
        async with open_house(ladder_of(up.url, server="stall_s = 0.5")) as house:
            raw = await opened(house)
            raw.writer.write(request("1.1", stream=True))
            raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
            async with asyncio.timeout(10):
                await up.left.wait()
            await gone(house)
            await house.idle()
            # What the sockets' own buffers take, and no more.
            assert sent * 10_000 < 30 << 20
            assert house.lines[0]["error"] == "client_left"
            raw.writer.transport.abort()


async def test_a_stream_under_way_ends_whole_while_the_server_drains() -> None:
    go = asyncio.Event()

    async def slow(one: Request, reply: Reply) -> None:
        await reply.start()
        await reply.event(chunk({"content": "Hel"}))
        await go.wait()
        await reply.event(chunk({"content": "lo"}, "stop"))
        await reply.event(b"[DONE]")
        await reply.end()

    async with FakeUpstream(slow) as up, open_house(ladder_of(up.url)) as house:
        idle, busy = await opened(house), await opened(house)
        asked = asyncio.ensure_future(busy.ask(request("1.1", stream=True)))
        async with asyncio.timeout(5):
            while not house.shared.observer.in_flight:
                await asyncio.sleep(0)
        house.server.pre_shutdown()
        assert await idle.reader.read() == b""
        go.set()
        _, _, body = await asked
        assert body.endswith(b"data: [DONE]\n\n")
        assert await busy.reader.read() == b""
        for one in (idle, busy):
            one.writer.close()


async def test_a_client_that_keeps_its_connection_makes_one() -> None:
    async with FakeUpstream(GOOD) as up, open_house(ladder_of(up.url)) as house:
        seen: set[Any] = set()
        for body in (HI, STREAM) * 3:
            assert (await house.post("/v1/chat/completions", body))[0] == 200
            seen.update(house.server.connections)
        assert len(seen) == 1
