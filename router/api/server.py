"""aiohttp's server with our errors and our time limits at the edge.

Below `web.Application`, whose routing and middlewares cost more than a whole call may. What
aiohttp answers by itself (a malformed request line, too large a header) is put into the OpenAI
envelope, and a connection that does not finish its first request head in time is closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from router.errors import BadRequest, InternalFault, RouterError

_log = logging.getLogger("rungway")
_LINE_BYTES_MAX = 16 << 10
_REASON_CHARS_MAX = 300

# Makes and records the answer to what could not be read as a request.
Refuse = Callable[[RouterError], web.Response]


class Connection(RequestHandler):
    """One client connection."""

    __slots__ = ("_header_s", "_refuse", "_stall_s", "_stall_timer", "when_left")

    def __init__(
        self, manager: Server, *, header_s: float, stall_s: float, refuse: Refuse, **kwargs: Any
    ) -> None:
        super().__init__(manager, **kwargs)
        self._header_s = header_s
        self._stall_s = stall_s
        self._refuse = refuse
        self._stall_timer: asyncio.TimerHandle | None = None
        # Instead of cancelling the task that serves the request (`flow/sink.py`).
        self.when_left: Callable[[], None] | None = None

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
        reply.force_close()
        return reply

    def _stalled(self) -> None:
        """The client has read nothing for so long that what waits for it is given up."""
        self._stall_timer = None
        if self.transport is not None:
            self.transport.abort()

    def _drop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


class Server(web.Server):
    """Makes our connections. `connections_max` more are closed as soon as they are made."""

    def __init__(
        self,
        handler: Any,
        *,
        refuse: Refuse,
        header_s: float,
        stall_s: float,
        idle_connection_s: float,
        connections_max: int,
    ) -> None:
        # Who leaves is the connection's matter: a call may be one that goes on.
        super().__init__(handler, handler_cancellation=False)
        self.connections_max = connections_max
        self._settings: dict[str, Any] = {
            "refuse": refuse,
            "header_s": header_s,
            "stall_s": stall_s,
            "keepalive_timeout": idle_connection_s,
            "access_log": None,
            "max_line_size": _LINE_BYTES_MAX,
            "max_field_size": _LINE_BYTES_MAX,
            "lingering_time": 2.0,
        }

    def __call__(self) -> RequestHandler:
        return Connection(self, loop=self._loop, **self._settings)
