"""The daemon's life: listen, say so, reload on SIGHUP, drain on SIGTERM.

`Daemon` serves, in one process; its `Overseer` says where it listens, and when it reloads and ends.
A process alone has `Alone`: signals and systemd. One of several workers has its line to the parent
(`workers/worker.py`).

A reload is all or nothing: a configuration that is refused, or whose backends cannot be made,
leaves the running one as it was. What the listener depends on (host, port, connection limits) needs
a restart, and the reload says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from router.api.gateway import Gateway
from router.api.server import Server
from router.api.service import Service
from router.app import close_shared, open_shared, prepare_service, take_up
from router.config.model import Config
from router.config.schema import Server as ServerSettings
from router.config.secrets import SecretError
from router.errors import ConfigError
from router.flow.events import Events
from router.flow.observe import write_to_stderr
from router.flow.probes import probe_forever
from router.flow.tasks import Tasks
from router.store.base import StateRefused
from router.transport.http import HttpClient

_log = logging.getLogger("rungway")
BACKLOG = 1024
# Calls of a replaced configuration may still use its backends for this long.
_RETIRE_S = 900.0
# A call at work holds some hundred containers, so Python's usual 700 had the collector look through
# all calls every few of them, in vain: calls leave few cycles. These many are a few megabytes.
_YOUNG_MAX = 10_000
_ROUNDS = 20
# A line of the log may be so old when it is written.
_LINES_WAIT_S = 0.1
# For the last error events of calls that the drain could not wait for.
_LAST_WORDS_S = 1.0


class StartError(Exception):
    """The daemon cannot start; the text says why and what to do."""


class Overseer(Protocol):
    """Who commands a daemon and is told of its steps."""

    async def listen(self, daemon: Daemon, server: Server) -> list[asyncio.Server]:
        """Have connections made, and command the daemon from now on. Raises StartError."""

    def listening(self, listeners: list[asyncio.Server]) -> None: ...

    def stopping(self) -> None: ...

    async def reload(self) -> str | None:
        """A client asks for a reload: why it was refused, or None."""


class Daemon:
    """One process that serves one configuration after another."""

    def __init__(
        self,
        config: Config,
        overseer: Overseer,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._config = config
        self._overseer = overseer
        self._environ = environ
        self._stopping = asyncio.Event()
        self._looking: list[asyncio.Task[None]] = []
        self._at_once = asyncio.Event()
        self.tasks = Tasks()
        self.events = Events()

    async def run(self) -> None:
        """Serve until told to stop. Raises StartError."""
        loop = asyncio.get_running_loop()
        try:
            shared = await open_shared(
                self._config,
                self._environ,
                write_to_stderr,
                self.tasks,
                self.events,
                later=lambda write: loop.call_later(_LINES_WAIT_S, write),
            )
        except StateRefused as error:
            await self.tasks.aclose()
            raise StartError(str(error)) from error
        self._shared = shared
        self._client = HttpClient()
        try:
            try:
                service = self.make(self._config)
            except SecretError as error:
                raise StartError(str(error)) from error
            take_up(self._config, shared)
            self._services = [service]
            self._gateway = Gateway(service, self._shared, self._overseer.reload)
            server = self._server()
            listeners = await self._overseer.listen(self, server)
            self._probe(service)
            leave_what_stays_to_itself()
            self._overseer.listening(listeners)
            await self._stopping.wait()
            await self._drain(listeners, server)
            for service in self._services:
                await close_backends(service)
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

    def stop_at_once(self) -> None:
        """End the calls under way with their last words, whatever was said before."""
        self._at_once.set()
        self._stopping.set()

    def make(self, config: Config) -> Service:
        """A service of this configuration, not yet used. Raises SecretError."""
        return prepare_service(config, self._shared, self._client, self._environ)

    def adopt(self, config: Config, service: Service) -> None:
        """Serve this from now on; the calls under way keep what they began with."""
        take_up(config, self._shared)
        old, self._gateway.service, self._config = self._gateway.service, service, config
        self._probe(service)
        self._services.append(service)
        self._shared.board.reopen()
        self.tasks.spawn(self._retire(old), "retire the old configuration")

    def _server(self) -> Server:
        settings = self._config.server
        return Server(
            self._gateway.handle,
            refuse=self._gateway.refuse,
            hot=self._gateway.hot_routes(),
            header_s=settings.header_s,
            stall_s=settings.stall_s,
            idle_connection_s=settings.idle_connection_s,
            connections_max=settings.max_connections,
        )

    def _probe(self, service: Service) -> None:
        for task in self._looking:
            task.cancel()
        every_s = self._config.server.probe_s
        backends, board = list(service.backends.values()), self._shared.board
        probes = probe_forever(backends, board, every_s, service.note_probe)
        ladders = list(self._config.ladders.values())
        canaries = service.pipeline.continuity.prove_forever(ladders, every_s)
        spawn = self.tasks.spawn
        self._looking = [spawn(probes, "probes"), spawn(canaries, "canaries")]

    async def _drain(self, listeners: list[asyncio.Server], server: Server) -> None:
        """No new connections; what is under way may end within `drain_s`."""
        limit_s = self._config.server.drain_s
        self._overseer.stopping()
        self._shared.is_draining = True
        for listener in listeners:
            listener.close()
        _log.info(
            "stopping: waiting up to %g s for %d calls; again to stop at once",
            limit_s,
            self._shared.observer.in_flight,
        )
        server.pre_shutdown()  # connections without a call go at once
        spawn = self.tasks.spawn
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
        await close_backends(service)


class Alone:
    """The overseer of a process without a parent: signals command it, and systemd is told.

    `reread` gives the configuration anew for a reload and raises ConfigError; `announce` is called
    with the address once it listens.
    """

    def __init__(
        self,
        settings: ServerSettings,
        reread: Callable[[], Config] | None,
        announce: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._reread = reread
        self._announce = announce
        self._daemon: Daemon | None = None

    async def listen(self, daemon: Daemon, server: Server) -> list[asyncio.Server]:
        settings = self._settings
        loop = asyncio.get_running_loop()
        try:
            listener = await loop.create_server(
                server, settings.host, settings.port, backlog=BACKLOG, reuse_address=True
            )
        except OSError as error:
            raise cannot_listen(settings, error) from error
        self._daemon = daemon
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, daemon.stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        return [listener]

    def listening(self, listeners: list[asyncio.Server]) -> None:
        self._announce(address(listeners[0].sockets[0].getsockname()))
        notify("READY=1")

    def stopping(self) -> None:
        notify("STOPPING=1")

    async def reload(self) -> str | None:
        return self._reload()

    def _reload(self) -> str | None:
        """Take the configuration anew; why it was refused, or None: then nothing has changed."""
        assert self._daemon is not None
        if self._reread is None:
            refused = "there is nothing to reload: this daemon runs without a configuration file"
            _log.warning(refused)
            return refused
        notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            config = self._reread()
            service = self._daemon.make(config)
        except (ConfigError, SecretError) as error:
            return refused_reload(str(error))
        else:
            self._daemon.adopt(config, service)
            tell_of_reload(self._settings, config)
            return None
        finally:
            notify("READY=1")


def leave_what_stays_to_itself() -> None:
    """Have the collector look only among what calls make: what a start has made stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_MAX, _ROUNDS, _ROUNDS)


def refused_reload(why: str) -> str:
    """Log that a reload changed nothing; what to tell who asked for it."""
    _log.error("the reload is refused, the running configuration stays:\n%s", why)
    return f"the file is refused, the old configuration stays:\n{why}"


def tell_of_reload(used: ServerSettings, config: Config) -> None:
    """Log what a reload brought, and what of it waits for the next start."""
    for setting in _needs_restart(used, config.server):
        _log.warning("server.%s changed: it takes effect at the next start", setting)
    _log.info("reloaded: %d ladders, %d keys", len(config.ladders), len(config.keys))


def cannot_listen(settings: ServerSettings, error: OSError) -> StartError:
    where = f"{settings.host}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        return StartError(f"{where} is taken, perhaps by another Rungway; choose one with --port")
    return StartError(f"cannot listen on {where}: {error.strerror or error}")


async def close_backends(service: Service) -> None:
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


def address(bound: Any) -> str:
    """The URL of what `getsockname` gave."""
    host, port = bound[:2]
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
