"""A reload of several workers: each makes the new configuration, then all serve it or none.

The parent reads the file first, which finds nearly all that can be wrong. Then each worker reads it
too, and says of what file it made its service: one that changed in between is refused. A worker
that ends meanwhile is no obstacle, since the one in its place begins with the outcome. Who asks
while a reload is under way gets one of its own after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from router.config.model import Config
from router.daemon import notify, refused_reload, tell_of_reload
from router.errors import ConfigError
from router.types import Json
from router.workers.channels import Channels
from router.workers.worker import RELOAD_S

# The worker that asked, and its number for the question; None is a signal.
Asker = tuple[int, int] | None


@dataclass(slots=True)
class _Round:
    """One reload under way. `waiting` are those that have not said whether they could."""

    config: Config
    askers: list[Asker]
    waiting: set[int]
    deadline: float
    refused: str | None = None


class Reloads:
    """`config` is what all workers serve, and what a new one is to begin with."""

    def __init__(self, channels: Channels, config: Config, reread: Callable[[], Config]) -> None:
        self._channels = channels
        self._reread = reread
        self._started_with = config.server
        self._askers: list[Asker] = []
        self._round: _Round | None = None
        self._rounds = 0
        self.config = config

    @property
    def deadline(self) -> float | None:
        """When the reload under way is given up; None: there is none."""
        return None if self._round is None else self._round.deadline

    def ask(self, asker: Asker) -> None:
        # One signal more says nothing that the one before it did not.
        if asker is not None or None not in self._askers:
            self._askers.append(asker)
        if self._round is None:
            self._begin()

    def prepared(self, number: int, message: Json) -> None:
        """A worker could make the new configuration, or could not."""
        current = self._round
        if current is None or message["round"] != self._rounds:
            return
        if message["refused"] is not None:
            current.refused = current.refused or message["refused"]
        elif message["digest"] != current.config.digest:
            current.refused = current.refused or "it changed while it was read; reload again"
        self.lost(number)

    def lost(self, number: int) -> None:
        """Nothing more is to be heard of this worker in this round."""
        if self._round is not None:
            self._round.waiting.discard(number)
            if not self._round.waiting:
                self._conclude(self._round)

    def keep_time(self, now: float) -> None:
        if self._round is not None and now > self._round.deadline:
            late = ", ".join(str(number + 1) for number in sorted(self._round.waiting))
            self._round.refused = f"worker {late} did not answer within {RELOAD_S:g} s"
            self._conclude(self._round)

    def _begin(self) -> None:
        askers, self._askers = self._askers, []
        notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            config = self._reread()
        except ConfigError as error:
            self._tell(askers, refused_reload(str(error)))
            return
        self._rounds += 1
        waiting = self._channels.numbers()
        self._round = _Round(config, askers, waiting, time.monotonic() + RELOAD_S)
        for number in waiting:
            self._channels.send(number, {"is": "prepare", "round": self._rounds})
        if not waiting:
            self._conclude(self._round)

    def _conclude(self, ended: _Round) -> None:
        self._round = None
        verdict = "adopt" if ended.refused is None else "forget"
        for number in self._channels.numbers():
            self._channels.send(number, {"is": verdict})
        if ended.refused is None:
            self.config = ended.config
            tell_of_reload(self._started_with, ended.config)
            self._tell(ended.askers, None)
        else:
            self._tell(ended.askers, refused_reload(ended.refused))
        if self._askers:
            self._begin()

    def _tell(self, askers: list[Asker], refused: str | None) -> None:
        notify("READY=1")
        for asker in askers:
            if asker is not None:
                number, asked = asker
                self._channels.send(number, {"is": "reloaded", "id": asked, "refused": refused})
