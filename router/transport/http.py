"""HTTP to upstreams, behind an interface narrow enough to be replaced by a transport of our own.

Request headers are built anew by the backends: nothing of a client's goes out. Redirects are never
followed, so a token goes only to the host that it was configured for. Upstreams are asked for
`identity` encoding, since a compressed stream cannot pass through event by event.

This is one of the two places that turn the world's failures into ours (`_failure`).
"""

from __future__ import annotations

import asyncio
import io
import os
import select
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import aiohttp

from router.errors import ConnectFailed, UpstreamBroken, UpstreamError, UpstreamTimeout
from router.transport.proxies import Proxies

# Below the 5 s after which uvicorn and cpp-httplib close an idle connection, so that a call does
# not meet a connection that its server is just closing.
_IDLE_CONNECTION_S = 4.0
_HEADER_BYTES_MAX = 32 << 10
_READ_BYTES = 64 << 10
_END_S = 0.25
_SHOWN_CHARS_MAX = 100
_WHOLE_BODY_BYTES_MAX = 1 << 20


class HttpResponse:
    """An open answer: status and headers are here, the body is read in pieces.

    `close` may be called at any time and any number of times; before the body's end it closes the
    connection, which is how an upstream learns that nobody listens any more.
    """

    def __init__(self, response: aiohttp.ClientResponse, endings: set[asyncio.Task[None]]) -> None:
        self._response = response
        self._endings = endings
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    @property
    def content_type(self) -> str:
        """The media type without parameters, lower case; "" where there is none."""
        kind = self.headers.get("content-type", "")[:_SHOWN_CHARS_MAX]
        return kind.partition(";")[0].strip().lower()

    async def read_chunk(self) -> bytes:
        """What has arrived, at most 64 KiB; b"" at the body's clean end. Raises UpstreamError."""
        try:
            return await self._response.content.read(_READ_BYTES)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _failure(error, "while reading the answer") from error

    async def read_all(self, bytes_max: int) -> bytes:
        """The whole body. Raises UpstreamBroken when it is larger than `bytes_max`."""
        parts: list[bytes] = []
        size = 0
        while chunk := await self.read_chunk():
            size += len(chunk)
            if size > bytes_max:
                self.close()
                raise UpstreamBroken(f"the answer is larger than {bytes_max} bytes")
            parts.append(chunk)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        self._response.close()

    def close_when_ended(self) -> None:
        """Close, but give a body whose content is all here a moment to end: its last chunk often
        comes after it, and only then can the connection serve another request.
        """
        if self._response.connection is None:
            return
        task = asyncio.get_running_loop().create_task(self._wait_for_end())
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _wait_for_end(self) -> None:
        try:
            async with asyncio.timeout(_END_S):
                # Once: a body that goes on is not worth its connection.
                await self._response.content.read(_READ_BYTES)
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
            pass
        finally:
            self._response.close()

    async def __aenter__(self) -> HttpResponse:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Connector(aiohttp.TCPConnector):
    """Takes no connection from its pool on which something came after the last answer: what came
    would be taken for the next caller's. An end may have come too, of which the loop has not heard
    yet: llama.cpp closes behind each stream without a word of it in the head.
    """

    async def _get(self, key: Any, traces: Any) -> Any:
        kept = self._conns.get(key)
        while kept and _is_readable(kept[0][0].transport):
            kept.popleft()[0].close()
        if kept is not None and any(connection[0].should_close for connection in kept):
            clean = deque(one for one in kept if not one[0].should_close)
            for connection in kept:
                if connection not in clean:
                    connection[0].close()
            if clean:
                self._conns[key] = clean
            else:
                del self._conns[key]
        return await super()._get(key, traces)


def _is_readable(transport: Any) -> bool:
    """Whether the system has something for an idle connection, or its end."""
    socket = transport.get_extra_info("socket") if transport is not None else None
    if socket is None or socket.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(socket.fileno(), select.POLLIN)
    return bool(poll.poll(0))


class HttpClient:
    """Keep-alive connections to any number of hosts. Make it inside the running loop."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=_Connector(limit=0, keepalive_timeout=_IDLE_CONNECTION_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Content-Type"),
            headers={"Accept-Encoding": "identity"},
            max_field_size=_HEADER_BYTES_MAX,
            max_line_size=_HEADER_BYTES_MAX,
            read_bufsize=_READ_BYTES,
        )
        self._proxies = Proxies()
        self._endings: set[asyncio.Task[None]] = set()
        self._timeouts: dict[float, aiohttp.ClientTimeout] = {}

    async def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None = None,
        connect_s: float = 5.0,
    ) -> HttpResponse:
        """Send a request and wait for its headers, without a limit but `connect_s` (seconds).

        The caller limits the wait and closes the response. Raises UpstreamError.
        """
        timeout = self._timeouts.get(connect_s)
        if timeout is None:
            timeout = aiohttp.ClientTimeout(total=None, connect=connect_s)
            self._timeouts[connect_s] = timeout
        try:
            response = await self._session.request(
                method,
                url,
                headers=headers,
                data=_payload(body),
                timeout=timeout,
                proxy=self._proxies.proxy_for(url),
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _failure(error, f"on {method} {_safe(url)}") from error
        return HttpResponse(response, self._endings)

    async def fetch(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None = None,
        bytes_max: int = 4 << 20,
        within_s: float = 10.0,
    ) -> tuple[int, Mapping[str, str], bytes]:
        """A small whole exchange, for probes and control calls: status, headers, body."""
        try:
            async with asyncio.timeout(within_s):
                response = await self.send(
                    method, url, headers=headers, body=body, connect_s=within_s
                )
                async with response:
                    return response.status, response.headers, await response.read_all(bytes_max)
        except TimeoutError as error:
            raise UpstreamTimeout(
                f"no answer within {within_s:g} s on {method} {_safe(url)}", phase="total"
            ) from error

    async def aclose(self) -> None:
        for task in list(self._endings):
            task.cancel()
        await self._session.close()


def _payload(body: bytes | None) -> bytes | io.BytesIO | None:
    """A large body in a form that aiohttp writes in pieces; it warns of one that holds the loop."""
    return io.BytesIO(body) if body is not None and len(body) > _WHOLE_BODY_BYTES_MAX else body


def _safe(url: str) -> str:
    """The address without its query, which may hold a secret."""
    return url.partition("?")[0]


def _failure(error: Exception, where: str) -> UpstreamError:
    """The one table from aiohttp's errors to ours."""
    words = _words(error)
    # Where nobody answers, its address says all, and the call's path nothing.
    text = words if isinstance(error, aiohttp.ClientConnectorError) else f"{words} {where}"
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return UpstreamTimeout(text, phase="connect")
    if isinstance(error, TimeoutError):
        return UpstreamTimeout(text, phase="answer")
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.InvalidURL):
        return ConnectFailed(text)
    return UpstreamBroken(text)


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError | socket.gaierror) or not error.errno or error.errno < 0:
        return error.strerror or str(error)
    # The loop's own text repeats the address.
    return os.strerror(error.errno).lower()


def _words(error: Exception) -> str:
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return "the connection was not made in time"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the upstream closed the connection without an answer"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the upstream's answer was cut off"
    if isinstance(error, aiohttp.ClientConnectorError):
        host = f"[{error.host}]" if ":" in error.host else error.host
        return f"cannot connect to {host}:{error.port} ({_reason(error.os_error)})"
    if isinstance(error, aiohttp.ClientResponseError):
        return "the upstream's answer is no HTTP that can be read"
    if isinstance(error, aiohttp.InvalidURL):
        return "the address is malformed"
    return f"the connection broke ({type(error).__name__})"
