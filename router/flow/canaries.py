"""Asks each rung of an embeddings ladder for its canary vectors before its first use.

And again after it failed, since what comes back need not be what went away. The first rung of a
vector space that answers sets the reference; who differs from it is closed, with an alarm. A ladder
of one rung has nobody to agree with and is not asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from router.backends.base import Backend, EmbedAttempt
from router.core import canary
from router.errors import RungRefused
from router.types import Ladder, Rung

_COOL_S = 300.0


class Canaries:
    """The references of one configuration, and which rungs agreed with theirs. `changed` hears of a
    rung that answers with other vectors than it did before.
    """

    def __init__(self, changed: Callable[[str], None]) -> None:
        self._changed = changed
        self._last: dict[str, list[bytes]] = {}
        self._references: dict[str, list[bytes]] = {}
        self._agreed: set[str] = set()
        self._asking: dict[str, asyncio.Lock] = {}

    def know(self, attempt: EmbedAttempt) -> bool:
        """Whether the rung agrees, or has nobody to agree with."""
        return len(attempt.call.ladder.rungs) < 2 or attempt.rung.name in self._agreed

    async def ensure(self, backend: Backend, attempt: EmbedAttempt) -> None:
        """Returns once the rung is known to agree. Raises UpstreamError."""
        if self.know(attempt):
            return
        rung = attempt.rung
        async with self._asking.setdefault(rung.name, asyncio.Lock()):
            if rung.name not in self._agreed:
                await self._ask(backend, attempt)

    def forget(self, rung: Rung) -> None:
        """The rung failed: ask again before it is used."""
        self._agreed.discard(rung.name)

    async def _ask(self, backend: Backend, attempt: EmbedAttempt) -> None:
        rung, space = attempt.rung, _space(attempt.call.ladder)
        call = replace(attempt.call, inputs=list(canary.TEXTS), dimensions=None, extra={})
        answer = await backend.embed(replace(attempt, call=call))
        before = self._last.get(rung.name, answer.vectors)
        self._last[rung.name] = answer.vectors
        if canary.difference(before, answer.vectors) is not None:
            self._changed(rung.name)
        reference = self._references.setdefault(space, answer.vectors)
        found = canary.difference(reference, answer.vectors)
        if found is not None:
            raise RungRefused(
                f"{rung.name} embeds into another space than the ladder's other rungs: {found}",
                code="vector_space",
                cool_s=_COOL_S,
            )
        self._agreed.add(rung.name)


def _space(ladder: Ladder) -> str:
    """Ladders that name the same space share its reference."""
    return ladder.vector_space or f"ladder {ladder.name}"
