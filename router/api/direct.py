"""Answers written straight to the client's connection, past aiohttp's response objects.

Those cost as much as all the rest of the server (`bench/`). What they did is done here for the few
forms that the hot routes answer in: a whole body with its length, or a stream in chunks (of an
HTTP/1.0 client: up to the close). aiohttp is handed the object when all is written, and finds
nothing left to do.

Header values come from ours and the configuration's words alone, and hold no line ends: what is
written here is not checked again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import formatdate

from aiohttp import HttpVersion11, web

_REASONS = {200: b"OK"}


class DirectAnswer(web.StreamResponse):
    """One answer. Raises ConnectionError where its client has left."""

    # The parent's constructor is not called: nothing that it makes is used.
    def __init__(self, request: web.BaseRequest) -> None:
        self._request = request
        self._protocol = request.protocol
        self._out = request.writer
        self._is_chunked = request.version >= HttpVersion11
        self._keeps = request.keep_alive
        self._pending = b""

    @property
    def status(self) -> int:
        return 200

    @property
    def keep_alive(self) -> bool:
        return self._keeps

    def force_close(self) -> None:
        self._keeps = False

    async def send_whole(self, headers: Mapping[str, str], body: bytes) -> None:
        """All of an answer that has its length."""
        head = self._head(headers, f"Content-Length: {len(body)}\r\n")
        self._put(head + body)
        await self._out.drain()

    def start(self, headers: Mapping[str, str]) -> None:
        """The head of a stream, which goes out with its first bytes."""
        if not self._is_chunked:
            # Without chunks only the closing tells where the stream ends.
            self._keeps = False
        self._pending = self._head(
            headers, "Transfer-Encoding: chunked\r\n" if self._is_chunked else ""
        )

    async def write(self, data: bytes) -> None:  # type: ignore[override]
        """Some of a stream, never empty. Waits while the client does not read."""
        self._put(self._pending + self._framed(data))
        self._pending = b""
        await self._out.drain()

    def write_now(self, data: bytes) -> bool:
        """As `write`, of a stream that has begun and a client that reads; else False, and nothing
        is sent."""
        protocol = self._protocol
        transport = protocol.transport
        if transport is None or protocol.writing_paused or self._pending or transport.is_closing():
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data)
        return True

    async def finish(self, data: bytes) -> None:
        """The last of a stream."""
        end = b"0\r\n\r\n" if self._is_chunked else b""
        self._put(self._pending + self._framed(data) + end)
        self._pending = b""
        await self._out.drain()

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing is left to be written."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to be written."""

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data

    def _head(self, headers: Mapping[str, str], length: str) -> bytes:
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        connection = "" if self._keeps == self._is_chunked else _connection(self._keeps)
        version = "1.1" if self._is_chunked else "1.0"
        head = f"HTTP/{version} 200 OK\r\n{lines}{length}{connection}Date: {_date()}\r\n\r\n"
        return head.encode("latin-1")

    def _put(self, data: bytes) -> None:
        transport = self._out.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        # What tells that an answer has begun.
        self._out.output_size += len(data)
        transport.write(data)


def _connection(keeps: bool) -> str:
    return "Connection: keep-alive\r\n" if keeps else "Connection: close\r\n"


class _Date:
    """The Date header's value, written once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = ""

    def __call__(self) -> str:
        now = int(time.time())
        if now != self._second:
            self._second, self._text = now, formatdate(now, usegmt=True)
        return self._text


_date = _Date()
