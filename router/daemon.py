"""The daemon's life: listen, say so, reload on SIGHUP, drain on SIGTERM.

A reload is all or nothing: a configuration that is refused, or whose backends cannot be made,
leaves the running one as it was. What the listener depends on (host, port, connection limits) needs
a restart, and the reload says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping

from router.api.gateway import Gateway
from router.api.server import Server
from router.api.service import Service
from router.app import close_shared, make_service, open_shared
from router.config.model import Config
from router.config.schema import Server as ServerSettings
from router.config.secrets import SecretError
from router.errors import ConfigError
from router.flow.observe import write_to_stderr
from router.flow.probes import probe_forever
from router.flow.tasks import Tasks
from router.store.base import StateRefused
from router.transport.http import HttpClient

_log = logging.getLogger("rungway")
_BACKLOG = 1024
# Calls of a replaced configuration may still use its backends for this long.
_RETIRE_S = 900.0
# For the last error events of calls that the drain could not wait for.
_LAST_WORDS_S = 1.0


class StartError(Exception):
    """The daemon cannot start; the text says why and what to do."""


class Daemon:
    """One process that serves one configuration after another.

    `reread` gives the configuration anew for a reload and raises ConfigError; `announce` is called
    with the address once it listens.
    """

    def __init__(
        self,
        config: Config,
        reread: Callable[[], Config] | None,
        announce: Callable[[str], None],
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._config = config
        self._started_with = config.server
        self._reread = reread
        self._announce = announce
        self._environ = environ
        self._stopping = asyncio.Event()
        self._looking: list[asyncio.Task[None]] = []
        self._at_once = asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises StartError."""
        tasks = Tasks()
        try:
            shared = await open_shared(self._config, self._environ, write_to_stderr, tasks)
        except StateRefused as error:
            await tasks.aclose()
            raise StartError(str(error)) from error
        self._shared = shared
        self._client = HttpClient()
        try:
            try:
                service = self._make(self._config)
            except SecretError as error:
                raise StartError(str(error)) from error
            self._services = [service]
            self._gateway = Gateway(service, self._shared, self.reload)
            server = self._server()
            listener = await self._listen(server)
            self._watch_signals()
            self._probe(service)
            self._announce(_address(listener))
            notify("READY=1")
            await self._stopping.wait()
            await self._drain(listener, server)
            for service in self._services:
                await _close_backends(service)
        finally:
            await close_shared(shared)
            await self._client.aclose()

    def stop(self) -> None:
        """Begin to drain; the second time, end the calls under way; the third, everything."""
        if self._at_once.is_set():
            for task in asyncio.all_tasks():
                task.cancel()
        elif self._stopping.is_set():
            _log.info("stopping at once: ending %d calls", self._shared.observer.in_flight)
            self._at_once.set()
        self._stopping.set()

    def reload(self) -> str | None:
        """Take the configuration anew; why it was refused, or None: then nothing has changed."""
        if self._reread is None:
            refused = "there is nothing to reload: this daemon runs without a configuration file"
            _log.warning(refused)
            return refused
        notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            config = self._reread()
            service = self._make(config)
        except (ConfigError, SecretError) as error:
            _log.error("the reload is refused, the running configuration stays:\n%s", error)
            return f"the file is refused, the old configuration stays:\n{error}"
        else:
            for setting in _needs_restart(self._started_with, config.server):
                _log.warning("server.%s changed: it takes effect at the next start", setting)
            old, self._gateway.service, self._config = self._gateway.service, service, config
            self._probe(service)
            self._services.append(service)
            self._shared.board.reopen()
            self._shared.tasks.spawn(self._retire(old), "retire the old configuration")
            _log.info("reloaded: %d ladders, %d keys", len(config.ladders), len(config.keys))
            return None
        finally:
            notify("READY=1")

    def _make(self, config: Config) -> Service:
        return make_service(config, self._shared, self._client, self._environ)

    def _server(self) -> Server:
        settings = self._config.server
        return Server(
            self._gateway.handle,
            refuse=self._gateway.refuse,
            header_s=settings.header_s,
            stall_s=settings.stall_s,
            idle_connection_s=settings.idle_connection_s,
            connections_max=settings.max_connections,
        )

    async def _listen(self, server: Server) -> asyncio.Server:
        settings = self._config.server
        loop = asyncio.get_running_loop()
        try:
            return await loop.create_server(
                server, settings.host, settings.port, backlog=_BACKLOG, reuse_address=True
            )
        except OSError as error:
            where = f"{settings.host}:{settings.port}"
            if error.errno == errno.EADDRINUSE:
                text = f"{where} is taken, perhaps by another Rungway; choose one with --port"
            else:
                text = f"cannot listen on {where}: {error.strerror or error}"
            raise StartError(text) from error

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.reload)

    def _probe(self, service: Service) -> None:
        for task in self._looking:
            task.cancel()
        every_s = self._config.server.probe_s
        probes = probe_forever(list(service.backends.values()), self._shared.board, every_s)
        ladders = list(self._config.ladders.values())
        canaries = service.pipeline.continuity.prove_forever(ladders, every_s)
        spawn = self._shared.tasks.spawn
        self._looking = [spawn(probes, "probes"), spawn(canaries, "canaries")]

    async def _drain(self, listener: asyncio.Server, server: Server) -> None:
        """No new connections; what is under way may end within `drain_s`."""
        limit_s = self._config.server.drain_s
        notify("STOPPING=1")
        self._shared.is_draining = True
        listener.close()
        _log.info(
            "stopping: waiting up to %g s for %d calls; again to stop at once",
            limit_s,
            self._shared.observer.in_flight,
        )
        server.pre_shutdown()  # connections without a call go at once
        spawn = self._shared.tasks.spawn
        ended = spawn(self._end_calls(limit_s), "drain")
        told_again = spawn(self._at_once.wait(), "a second signal")
        await asyncio.wait((ended, told_again), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            await self._end_calls(0)
        await server.shutdown(_LAST_WORDS_S)

    async def _end_calls(self, limit_s: float) -> None:
        """Let what every live configuration serves end within the limit, then end it."""
        await asyncio.gather(*(one.pipeline.drain(limit_s) for one in self._services))

    async def _retire(self, service: Service) -> None:
        await asyncio.sleep(_RETIRE_S)
        self._services.remove(service)
        await _close_backends(service)


async def _close_backends(service: Service) -> None:
    for backend in service.backends.values():
        await backend.aclose()


def _needs_restart(used: ServerSettings, new: ServerSettings) -> list[str]:
    names = (
        "host",
        "port",
        "workers",
        "header_s",
        "stall_s",
        "idle_connection_s",
        "max_connections",
    )
    return [name for name in names if getattr(used, name) != getattr(new, name)]


def _address(listener: asyncio.Server) -> str:
    host, port = listener.sockets[0].getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def notify(*lines: str) -> None:
    """Tell systemd, where it asks to be told (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as pipe:
        pipe.connect(address)
        pipe.sendall("\n".join(lines).encode())
