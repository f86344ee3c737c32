"""aiohttp's server with our errors and our time limits at the edge.

Below `web.Application`, whose routing and middlewares cost more than a whole call may. What
aiohttp answers by itself (a malformed request line, too large a header) is put into the OpenAI
envelope, and a connection that does not finish its first request head in time is closed.
"""

from __future__ import annotations

import logging
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from router.api.reply import SERVER_NAME, error_reply
from router.errors import BadRequest, InternalFault, RouterError

_log = logging.getLogger("rungway")
HEAD_BYTES_MAX = 64 << 10
_LINE_BYTES_MAX = 16 << 10


class Connection(RequestHandler):
    """One client connection."""

    __slots__ = ("_header_s",)

    def __init__(self, manager: Server, *, header_s: float, **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self._header_s = header_s

    def connection_made(self, transport: Any) -> None:
        manager = self._manager
        assert isinstance(manager, Server)
        super().connection_made(transport)
        if len(manager.connections) > manager.connections_max:
            self.force_close()
            return
        # aiohttp already closes a connection that is idle at this time; it only waits too long.
        handle = self._keepalive_handle
        if handle is not None:
            handle.cancel()
        self._next_keepalive_close_time = self._loop.time() + self._header_s
        self._keepalive_handle = self._loop.call_at(
            self._next_keepalive_close_time, self._process_keepalive
        )

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        error: RouterError
        if status == 500:
            _log.error("a request failed in a way nobody foresaw", exc_info=exc)
            error = InternalFault("Rungway failed; its log has the trace")
        else:
            error = BadRequest(f"this is no HTTP request that can be read: {message or exc}")
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun and cannot become an error")
        reply = error_reply(error, {"Server": SERVER_NAME})
        reply.force_close()
        return reply


class Server(web.Server):
    """Makes our connections. `connections_max` more are closed as soon as they are made."""

    def __init__(
        self,
        handler: Any,
        *,
        header_s: float,
        idle_connection_s: float,
        connections_max: int,
    ) -> None:
        super().__init__(handler, handler_cancellation=True)
        self.connections_max = connections_max
        self._settings: dict[str, Any] = {
            "header_s": header_s,
            "keepalive_timeout": idle_connection_s,
            "access_log": None,
            "max_line_size": _LINE_BYTES_MAX,
            "max_field_size": _LINE_BYTES_MAX,
            "lingering_time": 2.0,
        }

    def __call__(self) -> RequestHandler:
        return Connection(self, loop=self._loop, **self._settings)
