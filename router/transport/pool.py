"""Idle connections to one origin: the last one back is the first one out, and none idles long."""

from __future__ import annotations

import asyncio
from collections import deque

from router.transport.connection import Connection

# Below the 5 s after which uvicorn and cpp-httplib close an idle connection, so that a call does
# not meet a connection that its server is just closing.
IDLE_CONNECTION_S = 4.0
IDLE_CONNECTIONS_MAX = 1024


class Pool:
    """The idle ones; who is at work belongs to its answer."""

    __slots__ = ("__weakref__", "_idle", "_loop", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._idle: deque[Connection] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._idle)

    def take(self) -> Connection | None:
        """One that may be used, or None."""
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.is_fit():
                return connection
            connection.abort()
        return None

    def keep(self, connection: Connection) -> None:
        if len(self._idle) >= IDLE_CONNECTIONS_MAX:
            self._idle.popleft().abort()
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if self._timer is None:
            self._timer = self._loop.call_later(IDLE_CONNECTION_S, self._sweep)

    def drop(self) -> None:
        """Close them all: one was found closed, and the others idle as long."""
        while self._idle:
            self._idle.pop().abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        """Close those that idle too long. One timer for all of them, set for the oldest."""
        now = self._loop.time()
        idle = self._idle
        while idle and idle[0].idle_since + IDLE_CONNECTION_S <= now:
            idle.popleft().abort()
        self._timer = None
        if idle:
            self._timer = self._loop.call_at(idle[0].idle_since + IDLE_CONNECTION_S, self._sweep)
