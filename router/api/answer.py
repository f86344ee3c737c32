"""Answers as they go out: a whole body with its length, or a stream in chunks (to an HTTP/1.0
client: up to the close).

Headers are text, a line each with its end, as `lines` makes them. Their values come from ours and
the configuration's words alone, and hold no line ends: what is written here is not checked again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from http import HTTPStatus

from router.api.reply import JSON_TYPE, SERVER_NAME, Reply
from router.api.request import Request

_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def lines(headers: Mapping[str, str]) -> str:
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])


async def send(request: Request, reply: Reply, more: str) -> None:
    """A whole answer with `more` lines in its head. Raises ConnectionError."""
    request.write(whole(request, reply, more))
    if request.is_full:
        await request.drain()


def whole(request: Request, reply: Reply, more: str) -> bytes:
    """The bytes of such an answer."""
    headers, body = lines(reply.headers) + more, reply.body
    if body is not None:
        headers += f"Content-Type: {reply.content_type}\r\nContent-Length: {len(body)}\r\n"
    head = _head(request, f"{reply.status} {_PHRASES.get(reply.status, '')}", headers)
    return head + body if body and request.method != "HEAD" else head


async def send_whole(request: Request, headers: str, body: bytes) -> None:
    """The answer to a call that is JSON. Raises ConnectionError."""
    headers += f"Content-Type: {JSON_TYPE}\r\nContent-Length: {len(body)}\r\n"
    request.write(_head(request, "200 OK", headers) + body)
    if request.is_full:
        await request.drain()


class Stream:
    """The stream that answers one request; its head goes out with its first bytes.

    Who writes waits while the client does not read (`Request.drain`). Raises ConnectionError where
    it has left.
    """

    __slots__ = ("_is_chunked", "_pending", "_request")

    def __init__(self, request: Request, headers: str) -> None:
        self._request = request
        self._is_chunked = request.is_http_1_1
        if self._is_chunked:
            headers += "Transfer-Encoding: chunked\r\n"
        else:
            # Without chunks only the closing tells where the stream ends.
            request.part()
        self._pending = _head(request, "200 OK", headers)

    def write(self, data: bytes) -> None:
        """Some of it, never empty."""
        self._put(data, b"\r\n")

    def write_now(self, data: bytes) -> bool:
        """As `write`, of a stream that has begun and a client that reads; else False, and nothing
        is sent."""
        if self._pending:
            return False
        return self._request.write_now(
            b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data
        )

    def finish(self, data: bytes) -> None:
        """The last of it, never empty."""
        self._put(data, b"\r\n0\r\n\r\n")

    def _put(self, data: bytes, end: bytes) -> None:
        request, head = self._request, self._pending
        self._pending = b""
        if self._is_chunked:
            request.write(b"%b%x\r\n%b%b" % (head, len(data), data, end))
        else:
            request.write(head + data)


def _head(request: Request, status: str, headers: str) -> bytes:
    is_new, is_kept = request.is_http_1_1, request.is_kept
    connection = ""
    if is_kept != is_new:
        connection = "Connection: keep-alive\r\n" if is_kept else "Connection: close\r\n"
    version = "1.1" if is_new else "1.0"
    return f"HTTP/{version} {status}\r\n{headers}{connection}{_server_and_date()}\r\n".encode(
        "latin-1"
    )


class _ServerAndDate:
    """What stands in every head, written once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._text = ""

    def __call__(self) -> str:
        now = int(time.time())
        if now != self._second:
            self._second = now
            # As RFC 9110 has it: nothing here sets a locale, so the names are English.
            date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now))
            self._text = f"Server: {SERVER_NAME}\r\nDate: {date}\r\n"
        return self._text


_server_and_date = _ServerAndDate()
