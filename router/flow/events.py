"""What the workers of one daemon tell and ask each other; alone, a process tells nobody.

`publish` goes to every other worker's handler of that kind, without an answer and without waiting:
the others know it a moment later. `gather` asks every worker, this one included, and gives what
came within the limit. Payloads are JSON. What leads to the others is an `Outlet`, which
`workers/line.py` has; without one, nothing here costs more than a look.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from router.types import Json

GATHER_S = 0.5

Handler = Callable[[Json], None]
# Gives this worker's part of what is gathered.
Answer = Callable[[Json], Json]


@dataclass(frozen=True, slots=True)
class Gathered:
    """`answers` begins with this worker's own; `workers` is how many there are.

    `kept` is what the parent has for the kinds of which it keeps the last answers: those of workers
    that did not answer now, and its own.
    """

    answers: list[Json]
    workers: int = 1
    kept: list[Json] = field(default_factory=list)


class Outlet(Protocol):
    """The way to the other workers."""

    def publish(self, kind: str, payload: Json) -> None: ...

    async def gather(self, kind: str, payload: Json, own: Json, limit_s: float) -> Gathered: ...


class Events:
    """One worker's handlers and answers, by kind."""

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._answers: dict[str, Answer] = {}
        self.outlet: Outlet | None = None

    def on(self, kind: str, handler: Handler) -> None:
        """What to do when another worker publishes this."""
        self._handlers[kind] = handler

    def answers(self, kind: str, answer: Answer) -> None:
        """What to say when a worker, this one or another, gathers this."""
        self._answers[kind] = answer

    def publish(self, kind: str, payload: Json) -> None:
        """Tell every other worker."""
        if self.outlet is not None:
            self.outlet.publish(kind, payload)

    async def gather(self, kind: str, payload: Json, limit_s: float = GATHER_S) -> Gathered:
        """Every worker's answer that comes within the limit."""
        own = self.answer(kind, payload)
        if self.outlet is None:
            return Gathered([own])
        return await self.outlet.gather(kind, payload, own, limit_s)

    def heard(self, kind: str, payload: Json) -> None:
        """Another worker published this."""
        if (handler := self._handlers.get(kind)) is not None:
            handler(payload)

    def answer(self, kind: str, payload: Json) -> Json:
        return self._answers[kind](payload)
