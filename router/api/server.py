"""Where clients connect: to the front, which serves all that is plain, and behind it to aiohttp's
server, for good, with any connection on which something else comes.

aiohttp is imported when the first such connection comes: many a daemon never has one, and it would
be a fifth of its memory and a quarter of its start. A thread imports it, so that calls go on, each
step of theirs a few milliseconds later at worst. The connections that come meanwhile are not read,
and count as all others do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from router.api.answer import whole
from router.api.front import Front, FrontRequest, Fronts
from router.api.head import Head
from router.api.request import Refuse, Request
from router.errors import InternalFault

if TYPE_CHECKING:
    from router.api.aiohttp_server import AiohttpServer

_log = logging.getLogger("rungway")
# A thread's import cannot be ended, but nobody waits for it longer.
_IMPORT_S_MAX = 30.0
# What is answered where no request was read.
_UNREAD = Head("", "", {}, 0, is_kept=False)


class Server:
    """Makes the connections of clients. `connections_max` more are closed as soon as they are made.

    `hot` are the methods and targets that most ask for.
    """

    def __init__(
        self,
        handle: Callable[[Request], Awaitable[None]],
        *,
        refuse: Refuse,
        hot: list[tuple[str, str]],
        header_s: float,
        stall_s: float,
        idle_connection_s: float,
        connections_max: int,
    ) -> None:
        self._handle = handle
        self._refuse = refuse
        self._limits = {"header_s": header_s, "stall_s": stall_s, "idle_s": idle_connection_s}
        self._connections_max = connections_max
        self._fronts = Fronts(handle, self._hand_over, self._is_crowded, hot, **self._limits)
        self._behind: AiohttpServer | None = None
        # Handed over, with what came on them, and not yet taken.
        self._waiting: list[tuple[Front, bytes]] = []
        self._opening: asyncio.Task[None] | None = None
        self._is_ending = False

    @property
    def connections(self) -> list[Any]:
        """The front's, those that wait for aiohttp, and aiohttp's."""
        behind = [] if self._behind is None else self._behind.connections
        return [*self._fronts.open, *(front for front, _ in self._waiting), *behind]

    def pre_shutdown(self) -> None:
        """Connections without a request close; the others after its answer."""
        self._is_ending = True
        self._fronts.pre_shutdown()
        if self._behind is not None:
            self._behind.pre_shutdown()

    async def shutdown(self, limit_s: float | None) -> None:
        """End what is under way: it may take so long by itself, and so long when it is told to."""
        self.pre_shutdown()
        if self._opening is not None:
            await asyncio.wait((self._opening,), timeout=limit_s)
        if self._opening is not None:
            self._opening.cancel()
        for front, _ in self._waiting:
            front.close_when_sent()
        ends = [self._fronts.shutdown(limit_s)]
        if self._behind is not None:
            ends.append(self._behind.shutdown(limit_s))
        await asyncio.gather(*ends)

    def __call__(self) -> Front:
        return Front(self._fronts)

    async def open_behind(self) -> None:
        """From now on aiohttp's server takes connections at once. Raises what an import may."""
        async with asyncio.timeout(_IMPORT_S_MAX):
            made = await asyncio.to_thread(_aiohttp_server)
        self._behind = made(self._handle, self._refuse, **self._limits)

    def _is_crowded(self) -> bool:
        behind = 0 if self._behind is None else len(self._behind.connections)
        return len(self._fronts.open) + len(self._waiting) + behind > self._connections_max

    def _hand_over(self, front: Front, data: bytes) -> None:
        if self._behind is not None:
            self._behind.take_over(front.transport, data)
            return
        front.pause_reading()
        self._waiting.append((front, data))
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open_and_take())

    async def _open_and_take(self) -> None:
        try:
            await self.open_behind()
        except Exception:
            # The next connection tries again: files may have been short, or an upgrade under way.
            _log.exception("aiohttp cannot be imported: only plain requests are served")
        waiting, self._waiting, self._opening = self._waiting, [], None
        for front, data in waiting:
            if front.transport.is_closing():
                continue
            if self._behind is None:
                self._turn_away(front)
            else:
                front.resume_reading()
                self._behind.take_over(front.transport, data)
        if self._behind is not None and self._is_ending:
            self._behind.pre_shutdown()

    def _turn_away(self, front: Front) -> None:
        reply = self._refuse(InternalFault("Rungway serves only plain requests; its log has why"))
        front.transport.write(whole(FrontRequest(front, _UNREAD, b"", 0.0), reply, ""))
        front.close_when_sent()


def _aiohttp_server() -> type[AiohttpServer]:
    from router.api.aiohttp_server import AiohttpServer  # noqa: PLC0415

    return AiohttpServer
