"""Answers written straight to the connection are framed as HTTP says, for every kind of client."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest

from tests.fakes.upstream import FakeUpstream, Reply, Request
from tests.house import House, ladder_of, open_house

CHUNK = {"id": "c", "choices": [{"index": 0, "delta": {"content": "hé"}, "finish_reason": "stop"}]}
WHOLE = {
    "id": "c",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hé"},
            "finish_reason": "stop",
        }
    ],
}


async def chat(request: Request, reply: Reply) -> None:
    if not orjson.loads(request.body).get("stream"):
        await reply.json(WHOLE)
        return
    await reply.start(200, {"Content-Type": "text/event-stream"})
    await reply.send(b"data: " + orjson.dumps(CHUNK) + b"\n\ndata: [DONE]\n\n")
    await reply.end()


def request(version: str, headers: str = "", *, stream: bool = False) -> bytes:
    body = orjson.dumps(
        {"model": "chat", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    )
    head = (
        f"POST /v1/chat/completions HTTP/{version}\r\nHost: localhost\r\n{headers}"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Raw:
    """One connection, whose answers are read as their own head frames them."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, data: bytes) -> tuple[str, dict[str, str], bytes]:
        self.writer.write(data)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *rest = head[:-4].split("\r\n")
        headers = {name.lower(): value for name, _, value in (one.partition(": ") for one in rest)}
        assert len(headers) == len(rest), "no header stands twice"
        return line, headers, await self._body(headers)

    async def _body(self, headers: dict[str, str]) -> bytes:
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        if headers.get("transfer-encoding") != "chunked":
            return await self.reader.read()
        body = b""
        while size := int(await self.reader.readline(), 16):
            body += await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
        assert await self.reader.readexactly(2) == b"\r\n"
        return body


async def opened(house: House) -> Raw:
    url = urlsplit(house.url)
    return Raw(*await asyncio.open_connection(url.hostname, url.port))


CASES: list[tuple[str, str, bool, bool]] = [
    ("1.1", "", True, True),
    ("1.1", "Connection: close\r\n", True, False),
    ("1.0", "", False, False),
    ("1.0", "Connection: keep-alive\r\n", False, True),
]


@pytest.mark.parametrize(("version", "asked", "is_new", "keeps"), CASES)
async def test_a_whole_answer_has_its_length_and_keeps_the_connection_as_asked(
    version: str, asked: str, is_new: bool, keeps: bool
) -> None:
    async with FakeUpstream(chat) as up, open_house(ladder_of(up.url)) as house:
        raw = await opened(house)
        line, headers, body = await raw.ask(request(version, asked))
        assert line == f"HTTP/{version} 200 OK"
        assert headers["content-type"] == "application/json"
        assert headers["date"].endswith("GMT")
        assert orjson.loads(body)["choices"][0]["message"]["content"] == "hé"
        said = headers.get("connection")
        assert said == (None if keeps == is_new else "keep-alive" if keeps else "close")
        if keeps:
            assert (await raw.ask(request(version, asked)))[0].endswith("200 OK")
        else:
            assert await raw.reader.read() == b""
        raw.writer.close()


@pytest.mark.parametrize(("version", "asked", "is_new", "keeps"), CASES)
async def test_a_stream_comes_in_chunks_or_up_to_the_close(
    version: str, asked: str, is_new: bool, keeps: bool
) -> None:
    async with FakeUpstream(chat) as up, open_house(ladder_of(up.url)) as house:
        raw = await opened(house)
        _, headers, body = await raw.ask(request(version, asked, stream=True))
        assert headers["content-type"] == "text/event-stream"
        assert ("transfer-encoding" in headers) == is_new
        assert orjson.loads(body.partition(b"data: ")[2].partition(b"\n")[0]) == CHUNK
        assert body.endswith(b": rungway cost_usd=0\n\ndata: [DONE]\n\n")
        if keeps and is_new:
            assert (await raw.ask(request(version, asked, stream=True)))[0].endswith("200 OK")
        else:
            assert headers.get("connection") == ("close" if is_new else None)
            assert await raw.reader.read() == b""
        raw.writer.close()


async def test_a_client_that_left_before_its_answer_harms_nobody() -> None:
    arrived, go = asyncio.Event(), asyncio.Event()

    async def late(one: Request, reply: Reply) -> None:
        arrived.set()
        await go.wait()
        await chat(one, reply)

    async with FakeUpstream(late) as up, open_house(ladder_of(up.url)) as house:
        raw = await opened(house)
        raw.writer.write(request("1.1"))
        await arrived.wait()
        raw.writer.transport.abort()
        go.set()
        await house.idle()
        status, _, _ = await house.post("/v1/chat/completions", ask())
        assert status == 200
        assert house.lines[0]["error"] == "client_left"


def ask() -> Any:
    return {"model": "chat", "messages": [{"role": "user", "content": "Hi"}]}
