"""A fake upstream on a real socket: HTTP/1.1 bytes under the test's full control.

A test gives a handler, which sees each request and writes its answer with `Reply`: whole, in
pieces, wrong, cut off or never. The upstream counts what a test of answers alone cannot see: how
many connections were made, and whether a caller left.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import orjson


@dataclass(slots=True)
class Request:
    """One request as it arrived. `headers` are lower case."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Reply:
    """The answer to one request, written by the handler."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.keep_alive = True

    async def json(
        self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        await self.whole(
            orjson.dumps(value), status, {"content-type": "application/json", **(headers or {})}
        )

    async def whole(
        self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """A complete answer with a content-length."""
        await self.raw(head(status, {"content-length": str(len(body)), **(headers or {})}) + body)

    async def start(
        self, status: int = 200, headers: Mapping[str, str] | None = None, sse: bool = True
    ) -> None:
        """The head of a chunked answer; pieces follow with `send`, the end with `end`."""
        kind = {"content-type": "text/event-stream"} if sse else {}
        await self.raw(head(status, {**kind, "transfer-encoding": "chunked", **(headers or {})}))

    async def send(self, data: bytes) -> None:
        """One chunk of a chunked answer."""
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    async def event(self, value: Any, name: str = "") -> None:
        """One SSE event of a chunked answer, JSON-encoded unless it is bytes."""
        data = value if isinstance(value, bytes) else orjson.dumps(value)
        prefix = f"event: {name}\n".encode() if name else b""
        await self.send(prefix + b"data: " + data + b"\n\n")

    async def end(self) -> None:
        await self.raw(b"0\r\n\r\n")

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def cut(self) -> None:
        """Close the connection here and now, with a reset where the system allows one."""
        self.keep_alive = False
        self._writer.transport.abort()

    def close(self) -> None:
        """Close the connection cleanly after what was written."""
        self.keep_alive = False

    async def client_left(self) -> None:
        """Wait until the caller closes its connection."""
        while await self._reader.read(1 << 16):
            pass


Handler = Callable[[Request, Reply], Awaitable[None]]


@dataclass
class FakeUpstream:
    """`async with FakeUpstream(handler) as upstream: ... upstream.url`."""

    handler: Handler
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    open_connections: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def last(self) -> Request:
        return self.requests[-1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open_connections += 1
        try:
            while (request := await _read_request(reader)) is not None:
                self.requests.append(request)
                reply = Reply(reader, writer)
                await self.handler(request, reply)
                if not reply.keep_alive:
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open_connections -= 1
            self.left.set()
            self._tasks.discard(task)
            writer.close()


async def _read_request(reader: asyncio.StreamReader) -> Request | None:
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = raw.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    pairs = (line.split(":", 1) for line in lines if line)
    headers = {name.strip().lower(): value.strip() for name, value in pairs}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    path, _, query = target.partition("?")
    return Request(method, path, query, headers, body)


def head(status: int, headers: Mapping[str, str]) -> bytes:
    """A response head, with a reason phrase that nobody should read."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} Status\r\n{lines}\r\n".encode("latin-1")
