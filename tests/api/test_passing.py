"""Chunks that are like the one before them pass at a glance; nobody can tell but by the clock."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import orjson
import pytest

from tests.api.test_chat import STREAM, streamed
from tests.backends.rigs.openai import chunk
from tests.fakes.upstream import FakeUpstream, Reply, Request
from tests.house import House, ladder_of, open_house

TEXTS = ["Once", " upon", " a", "", " tïme", '\n"', "\\", " \u2028", "😀", " there"]


def payloads(*, alike: bool) -> list[bytes]:
    """The same answer in chunks that differ in their texts alone, or in no two things alike."""
    found = []
    for number, text in enumerate(TEXTS):
        one = chunk({"content": text})
        one["id"] = "chatcmpl-1" if alike else f"chatcmpl-{number}"
        found.append(orjson.dumps(one))
    return found


async def in_step(house: House, step: asyncio.Queue[None]) -> bytes:
    """The answer to a call whose upstream sends an event each time it is told to."""
    raw = b""
    async with house.client.post(f"{house.url}/v1/chat/completions", json=STREAM) as answer:
        async for data in answer.content.iter_any():
            raw += data
            step.put_nowait(None)
    return raw


@pytest.mark.parametrize("alike", [True, False])
async def test_each_event_goes_out_as_it_came_and_is_counted(alike: bool) -> None:
    sent = payloads(alike=alike)
    step: asyncio.Queue[None] = asyncio.Queue()

    async def told(request: Request, reply: Reply) -> None:
        await reply.start()
        for payload in sent:
            await reply.event(payload)
            await step.get()
        await reply.event(b"[DONE]")
        await reply.end()

    async with FakeUpstream(told) as up, open_house(ladder_of(up.url)) as house:
        raw = await in_step(house, step)
        await house.idle()
    frames = [b"data: " + one.replace("\u2028".encode(), b"\\u2028") + b"\n\n" for one in sent]
    assert raw.startswith(b"".join(frames))
    assert b'"finish_reason":"stop"' in raw
    # A server that reports nothing sends a token a chunk.
    assert house.lines[0]["output_tokens"] == sum(map(bool, TEXTS))


async def raw_answer(house: House, body: bytes) -> bytes:
    """All that comes on a connection which closes behind the answer."""
    reader, writer = await asyncio.open_connection(*house.url[7:].split(":"))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    raw = await reader.read()
    writer.close()
    return raw


async def test_what_comes_at_once_with_its_end_goes_out_as_one() -> None:
    whole = b"".join(
        b"data: " + one + b"\n\n"
        for one in [*payloads(alike=True)[:2], orjson.dumps(chunk({}, "stop")), b"[DONE]"]
    )

    async def told(request: Request, reply: Reply) -> None:
        await reply.start()
        await reply.send(whole)
        await reply.end()

    async with FakeUpstream(told) as up, open_house(ladder_of(up.url)) as house:
        raw = await raw_answer(house, orjson.dumps(STREAM))
    size, _, rest = raw.partition(b"\r\n\r\n")[2].partition(b"\r\n")
    assert rest[int(size, 16) :] == b"\r\n0\r\n\r\n", "one chunk has all of it"
    assert rest.startswith(whole.removesuffix(b"data: [DONE]\n\n"))
    assert rest.count(b"data: [DONE]\n\n") == 1


@pytest.mark.parametrize("rescue", [True, False])
async def test_a_stream_that_lasts_keeps_no_prompt_that_nobody_asks_again(rescue: bool) -> None:
    prompt = "What is kept for long is dear."
    messages = [{"role": "user", "content": prompt}]
    body = orjson.dumps({**STREAM, "messages": messages})
    goes_on = asyncio.Event()

    async def lasting(request: Request, reply: Reply) -> None:
        await reply.start()
        await reply.event(chunk({"content": "Indeed"}))
        await goes_on.wait()
        await reply.event(chunk({}, "stop"))
        await reply.event(b"[DONE]")
        await reply.end()

    def kept() -> int:
        lists = [one for one in gc.get_objects() if type(one) is list and one is not messages]
        return sum(one == messages for one in lists)

    settings = 'rescue = "continue"' if rescue else ""
    async with (
        FakeUpstream(lasting) as up,
        open_house(ladder_of(up.url, ladder=settings)) as house,
        house.client.post(f"{house.url}/v1/chat/completions", data=body) as answer,
    ):
        assert b"Indeed" in await answer.content.readany()
        assert bool(kept()) is rescue
        goes_on.set()
        assert b"[DONE]" in await answer.read()


async def test_the_limit_between_events_begins_anew_with_each() -> None:
    async def paced(request: Request, reply: Reply) -> None:
        await reply.start()
        for _ in range(6):
            await reply.event(chunk({"content": " tick"}))
            await asyncio.sleep(0.2)
        await reply.client_left()
        reply.close()

    text = ladder_of("URL", ladder="idle_s = 0.8")
    async with FakeUpstream(paced) as up, open_house(text.replace("URL", up.url)) as house:
        found, _, _ = await streamed(house)
    assert len(found) == 7
    error: Any = orjson.loads(found[-1])["error"]
    assert error["code"] == "upstream_timeout"
    assert "idle_s" in error["message"]


async def test_a_client_that_does_not_read_stops_an_upstream_of_small_events_too() -> None:
    sent = 0
    small = orjson.dumps(chunk({"content": "x" * 1_000}))
    is_stuck = asyncio.Event()

    async def flood(request: Request, reply: Reply) -> None:
        nonlocal sent
        await reply.start()
        try:
            while sent < 64 << 20:
                async with asyncio.timeout(1):
                    await reply.event(small)
                sent += len(small)
        except TimeoutError:
            is_stuck.set()

    async with FakeUpstream(flood) as up, open_house(ladder_of(up.url)) as house:
        _, writer = await asyncio.open_connection(*house.url[7:].split(":"), limit=1024)
        body = orjson.dumps(STREAM)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += f"content-length: {len(body)}\r\n"
        writer.write(head.encode() + b"\r\n" + body)
        async with asyncio.timeout(30):
            await is_stuck.wait()
        assert 0 < sent < 40 << 20
        writer.transport.abort()
