"""The parent of several workers: it holds the port, starts them, and has them act as one.

It serves nothing. It has no event loop and no threads, so that it may fork at any time: a worker
shares what the parent has loaded, and begins within milliseconds. The listening sockets are the
parent's, so a worker that ends leaves its backlog to the one that is started in its place.

Signals are the parent's alone, and systemd hears of it alone, once all are ready. `reloads.py` has
what a reload asks of the workers.
"""

from __future__ import annotations

import gc
import logging
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from router.app import ADOPT_STATE
from router.config.model import Config
from router.core import samples
from router.daemon import StartError, address, notify
from router.types import Json
from router.workers import worker
from router.workers.channels import Channel, Channels
from router.workers.line import KEPT_KINDS
from router.workers.reloads import Reloads
from router.workers.sockets import open_sockets

_log = logging.getLogger("rungway")
_START_S = 60.0
# Beyond `drain_s`: the last words, and closing.
_END_S = 10.0
# One that lived for so long did not fail at its start, and is started again at once.
_LIVED_S = 10.0
_AGAIN_S = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0)
_SIGNALS = (*worker.IGNORED, signal.SIGCHLD)


@dataclass(slots=True)
class _Child:
    """A worker's process; `counted` is its last answer to the scrapes that are kept."""

    pid: int
    began: float
    is_ready: bool = False
    counted: Json | None = None


@dataclass(slots=True)
class _Place:
    """What stays when a worker ends: its sockets, and how its processes fared."""

    sockets: list[socket.socket]
    child: _Child | None = None
    failures: int = 0
    due: float = 0.0


class Parent:
    """`reread` gives the configuration anew and raises ConfigError; `announce` is called with the
    address once all workers are ready.
    """

    def __init__(
        self, config: Config, reread: Callable[[], Config], announce: Callable[[str], None]
    ) -> None:
        self._settings = config.server
        self._reread = reread
        self._announce = announce
        self._selector = selectors.DefaultSelector()
        self._channels = Channels(self._selector)
        self._places: list[_Place] = []
        self._is_announced = False
        self._failed: StartError | None = None
        self._stops = 0
        self._kill_at: float | None = None
        self._reloads = Reloads(self._channels, config, reread)
        self._restarts = 0
        self._ended: samples.Families = []

    def run(self) -> None:
        """Serve until told to stop. Raises StartError, KeyboardInterrupt at a third signal."""
        sockets = open_sockets(self._settings, self._settings.workers)
        self._url = address(sockets[0][0].getsockname())
        self._places = [_Place(one) for one in sockets]
        start_by = time.monotonic() + _START_S
        # What is loaded by now is shared by all workers for as long as nobody writes to it.
        gc.collect()
        gc.freeze()
        with self._hearing_signals():
            while True:
                now = time.monotonic()
                if not self._is_announced and now > start_by:
                    self._fail(f"the workers were not ready within {_START_S:g} s")
                self._start_due(now)
                self._keep_time(now)
                if self._stops and not any(place.child for place in self._places):
                    break
                self._wait(now)
        if self._failed is not None:
            raise self._failed
        if self._stops > 2:
            raise KeyboardInterrupt

    # --- processes ---

    def _start_due(self, now: float) -> None:
        # While a reload is under way a new worker would not know which configuration is right.
        if self._stops or self._reloads.deadline is not None:
            return
        for number, place in enumerate(self._places):
            if place.child is not None or place.due > now:
                continue
            try:
                place.child = _Child(self._start(number), now)
            except OSError as error:
                # Too many processes or open files: that may pass.
                words = f"worker {number + 1} cannot be started: {error.strerror or error}"
                if not self._is_announced:
                    self._fail(words)
                    return
                self._put_off(place, now)
                _log.error("%s", words)

    def _start(self, number: int) -> int:
        """The new worker's process id. Raises OSError."""
        theirs = self._channels.open(number)
        sys.stdout.flush()
        sys.stderr.flush()
        # No signal may reach a worker that still has the parent's handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._become_worker(number, theirs)
        except OSError:
            self._channels.forget(number)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            theirs.close()
        return pid

    def _become_worker(self, number: int, channel: socket.socket) -> None:
        """In the new process; never returns."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._channels.close_ours()
            self._selector.close()
            self._heard.close()
            self._wakes.close()
            for other, place in enumerate(self._places):
                if other != number:
                    for one in place.sockets:
                        one.close()
            workers, sockets = len(self._places), self._places[number].sockets
            made = worker.Worker(number, workers, sockets, channel, self._reread)
            code = worker.run(made, self._reloads.config, number, workers, channel)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # The parent's own frames lie below: nothing of them may run here.
            os._exit(code)

    def _reap(self) -> None:
        for number, place in enumerate(self._places):
            if (child := place.child) is None:
                continue
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                for message in self._channels.read_out(number):
                    self._take(number, message)
                self._channels.forget(number)
                place.child = None
                self._lost(number, place, child, os.waitstatus_to_exitcode(status))

    def _lost(self, number: int, place: _Place, child: _Child, code: int) -> None:
        if child.counted is not None:
            families = samples.lasting(child.counted["families"])
            self._ended = samples.merged([self._ended, families])
        self._reloads.lost(number)
        if self._stops:
            return
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        if not self._is_announced:
            self._fail(f"worker {number + 1} {how} before it was ready")
            return
        now = time.monotonic()
        if now - child.began > _LIVED_S:
            place.failures = 0
        self._put_off(place, now)
        self._restarts += 1
        _log.error("worker %d (process %d) %s: starting it again", number + 1, child.pid, how)

    @staticmethod
    def _put_off(place: _Place, now: float) -> None:
        """The first time it is started again at once, then ever later."""
        place.due = now + _AGAIN_S[min(place.failures, len(_AGAIN_S) - 1)]
        place.failures += 1

    def _fail(self, words: str) -> None:
        """The start has failed, and its first reason is the one to tell."""
        if self._failed is None:
            self._failed = StartError(words)
            self._stop()

    # --- time and signals ---

    def _keep_time(self, now: float) -> None:
        self._reloads.keep_time(now)
        if self._kill_at is not None and now > self._kill_at:
            self._kill()
            self._kill_at = None

    def _wait(self, now: float) -> None:
        times = [place.due for place in self._places if place.child is None and not self._stops]
        if self._reloads.deadline is not None:
            times = [self._reloads.deadline]
        if self._kill_at is not None:
            times.append(self._kill_at)
        if not self._is_announced:
            times.append(now + 1.0)
        timeout = max(0.0, min(times) - now) if times else None
        for key, events in self._selector.select(timeout):
            if key.data is None:
                self._hear_signals()
                continue
            channel = cast("Channel", key.data)
            if events & selectors.EVENT_WRITE and channel.is_open:
                self._channels.write(channel)
            if events & selectors.EVENT_READ:
                for message in self._channels.read(channel):
                    self._take(channel.number, message)
                if not channel.is_open:
                    self._hung(channel.number)

    def _hung(self, number: int) -> None:
        """A line has ended: its worker goes by itself, or it is made to."""
        child = self._places[number].child
        if child is not None and not self._stops:
            os.kill(child.pid, signal.SIGKILL)

    @contextmanager
    def _hearing_signals(self) -> Iterator[None]:
        self._heard, self._wakes = socket.socketpair()
        self._heard.setblocking(False)
        self._wakes.setblocking(False)
        self._selector.register(self._heard, selectors.EVENT_READ)
        before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear_signals(self) -> None:
        for number in self._heard.recv(1 << 10):
            if number == signal.SIGHUP:
                self._reload(None)
            elif number != signal.SIGCHLD:
                self._stop()
        # Also after other signals: one that tells of a child may have been lost among many.
        self._reap()

    def _stop(self) -> None:
        """Each worker drains; the second time it ends its calls; the third, everything ends."""
        self._stops += 1
        if self._stops == 1:
            notify("STOPPING=1")
            for place in self._places:
                for one in place.sockets:
                    one.close()
            self._kill_at = time.monotonic() + self._reloads.config.server.drain_s + _END_S
        if self._stops > 2:
            self._kill()
        for number in range(len(self._places)):
            self._channels.send(number, {"is": "stop"})

    def _kill(self) -> None:
        for place in self._places:
            if place.child is not None:
                os.kill(place.child.pid, signal.SIGKILL)

    # --- messages ---

    def _take(self, number: int, message: Json) -> None:
        match message["is"]:
            case "event":
                self._tell_others(number, message)
            case "ask":
                self._ask(number, message)
            case "answer":
                self._keep(number, message["kind"], message["payload"])
                self._channels.send(message["to"], {**message, "from": number})
            case "ready":
                self._ready(number)
            case "failed":
                _log.error("worker %d cannot start: %s", number + 1, message["words"])
                if not self._is_announced:
                    self._fail(message["words"])
            case "reload":
                self._reload((number, message["id"]))
            case "prepared":
                self._reloads.prepared(number, message)

    def _tell_others(self, number: int, message: Json) -> None:
        """Who is still starting hears it when it has started."""
        for other in range(len(self._places)):
            if other != number:
                self._channels.send(other, message)

    def _ask(self, number: int, message: Json) -> None:
        kind = message["kind"]
        if "own" in message:
            self._keep(number, kind, message.pop("own"))
        others = [
            other
            for other, place in enumerate(self._places)
            if other != number and place.child is not None and place.child.is_ready
        ]
        for other in others:
            self._channels.send(other, {**message, "from": number})
        kept = self._kept(number) if kind in KEPT_KINDS else []
        told = {"is": "asked", "id": message["id"], "others": others, "kept": kept}
        self._channels.send(number, told)

    def _keep(self, number: int, kind: str, payload: Json) -> None:
        child = self._places[number].child
        if kind in KEPT_KINDS and child is not None:
            child.counted = payload

    def _kept(self, number: int) -> list[tuple[int, Json]]:
        """What stands in for the others, should they not answer; the parent is number -1."""
        last = [
            (other, place.child.counted)
            for other, place in enumerate(self._places)
            if other != number and place.child is not None and place.child.counted is not None
        ]
        return [*last, (-1, {"families": self._families()})]

    def _families(self) -> samples.Families:
        restarts = samples.counter(
            "rungway_worker_restarts",
            "Workers that ended without being told to.",
            (),
            {(): self._restarts},
        )
        return [*self._ended, restarts]

    def _ready(self, number: int) -> None:
        child = self._places[number].child
        if child is not None:
            child.is_ready = True
        if self._stops:
            return
        if self._is_announced:
            _log.info("worker %d serves again", number + 1)
        elif all(place.child and place.child.is_ready for place in self._places):
            self._is_announced = True
            # Once: a worker that is started again takes no books but those that it knows.
            os.environ.pop(ADOPT_STATE, None)
            self._announce(self._url)
            notify("READY=1")

    def _reload(self, asker: tuple[int, int] | None) -> None:
        if not self._stops:
            self._reloads.ask(asker)
