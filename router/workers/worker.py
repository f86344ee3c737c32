"""One worker: a daemon whose overseer is its line to the parent.

A worker takes no signals: a terminal and systemd send them to every process of the daemon, and the
parent's word must not count twice. When the line ends the parent is gone, and the worker ends its
calls with their last words and goes too.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable

import uvloop

from router.api.server import Server
from router.api.service import Service
from router.config.model import Config
from router.config.secrets import SecretError
from router.config.share import share_of
from router.core.frames import frame
from router.daemon import BACKLOG, Daemon, StartError, close_backends
from router.errors import ConfigError
from router.types import Json
from router.workers.line import Line

_log = logging.getLogger("rungway")
# A reload parses the file in every process.
RELOAD_S = 30.0
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Worker:
    """The overseer of worker `index`, from 0. `reread` gives the whole configuration anew."""

    def __init__(
        self,
        index: int,
        workers: int,
        sockets: list[socket.socket],
        channel: socket.socket,
        reread: Callable[[], Config],
    ) -> None:
        self._index = index
        self._workers = workers
        self._sockets = sockets
        self._channel = channel
        self._reread = reread
        self._prepared: tuple[Config, Service] | None = None
        self._reloads: dict[int, asyncio.Future[str | None]] = {}
        self._reloads_asked = 0
        self._is_told_to_stop = False

    async def listen(self, daemon: Daemon, server: Server) -> list[asyncio.Server]:
        loop = asyncio.get_running_loop()
        self._daemon = daemon
        self._line = Line(daemon.events, self._workers, self._obey, self._orphaned)
        await loop.create_unix_connection(lambda: self._line, sock=self._channel)
        daemon.events.outlet = self._line
        return [
            await loop.create_server(server, sock=one, backlog=BACKLOG) for one in self._sockets
        ]

    def listening(self, listeners: list[asyncio.Server]) -> None:
        self._line.send({"is": "ready"})

    def stopping(self) -> None:
        return

    async def reload(self) -> str | None:
        self._reloads_asked += 1
        number = self._reloads_asked
        told: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._reloads[number] = told
        self._line.send({"is": "reload", "id": number})
        try:
            # Behind one that is under way, and through its own.
            async with asyncio.timeout(2 * RELOAD_S):
                return await told
        except TimeoutError:
            return "the parent process did not say what came of it; its log has more"
        finally:
            del self._reloads[number]

    def _obey(self, message: Json) -> None:
        match message["is"]:
            case "stop":
                self._is_told_to_stop = True
                self._daemon.stop()
            case "prepare":
                self._prepare(message["round"])
            case "adopt":
                if self._prepared is not None:
                    self._daemon.adopt(*self._prepared)
                    self._prepared = None
            case "forget":
                self._forget()
            case "reloaded":
                told = self._reloads.get(message["id"])
                if told is not None and not told.done():
                    told.set_result(message["refused"])

    def _prepare(self, number: int) -> None:
        """Make the new configuration, and wait for whether all others could."""
        self._forget()
        refused, digest = None, ""
        try:
            config = self._reread()
            mine = share_of(config, self._index, self._workers)
            self._prepared = (mine, self._daemon.make(mine))
            digest = config.digest
        except (ConfigError, SecretError) as error:
            refused = str(error)
        self._line.send({"is": "prepared", "round": number, "refused": refused, "digest": digest})

    def _forget(self) -> None:
        if self._prepared is not None:
            _, service = self._prepared
            self._prepared = None
            self._daemon.tasks.spawn(close_backends(service), "forget a configuration")

    def _orphaned(self) -> None:
        if not self._is_told_to_stop:
            _log.error("the parent process is gone: worker %d ends", self._index + 1)
        self._daemon.stop_at_once()


def run(worker: Worker, config: Config, index: int, workers: int, channel: socket.socket) -> int:
    """All of a worker's life in its new process; the exit code."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*IGNORED, signal.SIGCHLD))
    try:
        uvloop.run(Daemon(share_of(config, index, workers), worker).run())
    except StartError as error:
        channel.setblocking(True)
        channel.sendall(frame({"is": "failed", "words": str(error)}))
        return 1
    except asyncio.CancelledError:
        return 1
    return 0
