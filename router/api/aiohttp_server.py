"""aiohttp's server, which takes all that the front does not, with our errors and our time limits at
its edge. `server` alone imports it, late.

Below `web.Application`, whose routing and middlewares cost more than a whole call may. What
aiohttp answers by itself (a malformed request line, too large a header) is put into the OpenAI
envelope, and a connection that does not finish its first request head in time is closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import HttpVersion11, web
from aiohttp.web_protocol import RequestHandler

from router.api.reply import SERVER_NAME
from router.api.request import Refuse, Request
from router.errors import BadRequest, InternalFault, RouterError

_log = logging.getLogger("rungway")
_LINE_BYTES_MAX = 16 << 10
_REASON_CHARS_MAX = 300


class Connection(RequestHandler):
    """One client connection that the front has handed over."""

    __slots__ = ("_header_s", "_refuse", "_stall_s", "_stall_timer", "when_left")

    def __init__(
        self,
        manager: AiohttpServer,
        *,
        header_s: float,
        stall_s: float,
        refuse: Refuse,
        **kwargs: Any,
    ) -> None:
        super().__init__(manager, **kwargs)
        self._header_s = header_s
        self._stall_s = stall_s
        self._refuse = refuse
        self._stall_timer: asyncio.TimerHandle | None = None
        # Instead of cancelling the task that serves the request (`flow/sink.py`).
        self.when_left: Callable[[], None] | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # aiohttp already closes a connection that is idle at this time; it only waits too long.
        handle = self._keepalive_handle
        if handle is not None:
            handle.cancel()
        self._next_keepalive_close_time = self._loop.time() + self._header_s
        self._keepalive_handle = self._loop.call_at(
            self._next_keepalive_close_time, self._process_keepalive
        )

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waiting = len(self._messages)
        if waiting > 1 or (waiting and self._request_in_progress):
            # A request behind one that is being served: while it waits, aiohttp reads no further,
            # and would not see its client leave. No client needs pipelining; this one is the last.
            keep = 0 if self._request_in_progress else 1
            while len(self._messages) > keep:
                self._messages.pop()
            self.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self._loop.call_later(self._stall_s, self._stalled)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._drop_stall_timer()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._drop_stall_timer()
        task, act, self.when_left = self._task_handler, self.when_left, None
        super().connection_lost(exc)
        if act is not None:
            act()
        elif task is not None:
            task.cancel()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        error: RouterError
        if isinstance(exc, ConnectionError):
            # The client has left, which is nobody's fault; aiohttp knows what to do about it.
            raise exc
        if status == 500:
            _log.error("a request failed in a way nobody foresaw", exc_info=exc)
            error = InternalFault("Rungway failed; its log has the trace")
        else:
            reason = " ".join(str(message or exc).split())[:_REASON_CHARS_MAX]
            error = BadRequest(
                f"this is no HTTP request that can be read: {reason}", code="unreadable_request"
            )
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun and cannot become an error")
        reply = self._refuse(error)
        headers = {**reply.headers, "Server": SERVER_NAME}
        answer = web.Response(
            status=reply.status, body=reply.body, content_type=reply.content_type, headers=headers
        )
        answer.force_close()
        return answer

    def _stalled(self) -> None:
        """The client has read nothing for so long that what waits for it is given up."""
        self._stall_timer = None
        if self.transport is not None:
            self.transport.abort()

    def _drop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


class AioRequest:
    """A request that aiohttp has read."""

    __slots__ = ("_is_continued", "_is_kept", "_request", "is_begun")
    waited_s = 0.0

    def __init__(self, request: web.BaseRequest) -> None:
        self._request = request
        self._is_kept = bool(request.keep_alive)
        self._is_continued = False
        self.is_begun = False

    @property
    def method(self) -> str:
        return self._request.method

    @property
    def target(self) -> str:
        return self._request.raw_path

    @property
    def is_http_1_1(self) -> bool:
        return self._request.version >= HttpVersion11

    @property
    def peer(self) -> object:
        transport = self._request.transport
        return None if transport is None else transport.get_extra_info("peername")

    def header(self, name: str) -> str | None:
        return self._request.headers.get(name)

    @property
    def body_bytes(self) -> int | None:
        return self._request.content_length

    def take_body(self) -> bytes | None:
        return None

    async def read(self) -> bytes:
        if not self._is_continued:
            self._is_continued = True
            if (self.header("expect") or "").lower() == "100-continue":
                # aiohttp answers this only in its Application; without it curl waits a second.
                await self._request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            return await self._request.content.readany()
        except web.RequestPayloadError as error:
            raise BadRequest(f"the request body cannot be read: {error}") from error

    @property
    def is_kept(self) -> bool:
        return self._is_kept

    @property
    def is_full(self) -> bool:
        return self._request.protocol.writing_paused

    def part(self) -> None:
        self._is_kept = False

    def write(self, data: bytes) -> None:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        self.is_begun = True
        # What tells aiohttp that an answer has begun.
        self._request.writer.output_size += len(data)
        transport.write(data)

    def write_now(self, data: bytes) -> bool:
        transport = self._request.transport
        if transport is None or transport.is_closing() or self.is_full:
            return False
        transport.write(data)
        return True

    async def drain(self) -> None:
        await self._request.writer.drain()

    def close(self) -> None:
        if (transport := self._request.transport) is not None:
            transport.close()

    def abort(self) -> None:
        if (transport := self._request.transport) is not None:
            transport.abort()

    def when_left(self, act: Callable[[], None] | None) -> None:
        connection = self._request.protocol
        assert isinstance(connection, Connection)
        connection.when_left = act


class Written(web.StreamResponse):
    """What aiohttp is handed when all is written: it finds nothing left to do.

    Its own responses cost as much as all the rest of the server.
    """

    # The parent's constructor is not called: nothing that it makes is used.
    def __init__(self, *, is_kept: bool) -> None:
        self._is_kept = is_kept

    @property
    def keep_alive(self) -> bool:
        return self._is_kept

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing is left to be written."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to be written."""


class AiohttpServer(web.Server):
    """Takes over connections, each with what came on it since the start of a request."""

    def __init__(
        self,
        handle: Callable[[Request], Awaitable[None]],
        refuse: Refuse,
        *,
        header_s: float,
        stall_s: float,
        idle_s: float,
    ) -> None:
        # Who leaves is the connection's matter: a call may be one that goes on.
        super().__init__(self._serve, handler_cancellation=False)
        self._handle = handle
        self._settings: dict[str, Any] = {
            "refuse": refuse,
            "header_s": header_s,
            "stall_s": stall_s,
            "keepalive_timeout": idle_s,
            "access_log": None,
            "max_line_size": _LINE_BYTES_MAX,
            "max_field_size": _LINE_BYTES_MAX,
            "lingering_time": 2.0,
        }

    def take_over(self, transport: asyncio.Transport, data: bytes) -> None:
        connection = Connection(self, loop=self._loop, **self._settings)
        transport.set_protocol(connection)
        connection.connection_made(transport)
        connection.data_received(data)

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        # Its task may go on for others, and is theirs.
        self._connections.pop(handler, None)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        asked = AioRequest(request)
        try:
            await self._handle(asked)
        finally:
            asked.when_left(None)
        return Written(is_kept=asked.is_kept)
