"""Two attempts at one call, of which the first to have something to say gets the client.

The second starts only when the first has said nothing for a while, and is paid for from the
ladder's hedging budget. Whoever commits first cancels the other; what the loser used is still
counted. A failure of one leaves the call to the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from router.errors import RouterError
from router.flow.sink import Provenance, Sink
from router.types import Answer, Embeddings

Run = Callable[[Sink], Awaitable[None]]


class Lane:
    """One attempt's view of the client: its first content claims the sink for it alone."""

    def __init__(self, sink: Sink, race: _Race) -> None:
        self._sink = sink
        self._race = race

    @property
    def is_committed(self) -> bool:
        return self._race.winner is self and self._sink.is_committed

    @property
    def is_started(self) -> bool:
        return self._sink.is_started

    async def send_answer(self, answer: Answer, provenance: Provenance) -> None:
        self._race.claim(self)
        await self._sink.send_answer(answer, provenance)

    async def send_embeddings(self, answer: Embeddings, provenance: Provenance) -> None:
        self._race.claim(self)
        await self._sink.send_embeddings(answer, provenance)

    async def write(self, frames: bytes, provenance: Provenance) -> None:
        self._race.claim(self)
        await self._sink.write(frames, provenance)

    def write_now(self, frames: bytes) -> bool:
        return self._race.winner is self and self._sink.write_now(frames)

    async def comment(self, frame: bytes) -> None:
        if self._race.winner in (None, self):
            await self._sink.comment(frame)

    async def end(self, frames: bytes, provenance: Provenance) -> None:
        self._race.claim(self)
        await self._sink.end(frames, provenance)

    async def cut(self, frames: bytes, provenance: Provenance) -> bool:
        return await self._sink.cut(frames, provenance)

    async def fail(self, error: RouterError) -> None:
        await self._sink.fail(error)

    def when_left(self, act: Callable[[], None] | None) -> None:
        self._sink.when_left(act)


class _Race:
    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.winner: Lane | None = None
        self.tasks: dict[Lane, asyncio.Task[None]] = {}

    def start(self, run: Run) -> asyncio.Task[None]:
        lane = Lane(self._sink, self)

        async def running() -> None:
            await run(lane)

        task = asyncio.get_running_loop().create_task(running())
        self.tasks[lane] = task
        return task

    def claim(self, lane: Lane) -> None:
        """The lane has content. Raises CancelledError where the other had it first."""
        if self.winner is None:
            self.winner = lane
            for other, task in self.tasks.items():
                if other is not lane:
                    task.cancel()
        elif self.winner is not lane:
            raise asyncio.CancelledError

    async def stop(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        # They know this race.
        self.tasks.clear()
        self.winner = None


async def race(sink: Sink, after_s: float, first: Run, second: Callable[[], Run | None]) -> None:
    """Run `first`; when it has not committed within `after_s`, also what `second` gives, if any.

    Returns when one of them has answered; raises the first's error when both failed.
    """
    field = _Race(sink)
    one = field.start(first)
    try:
        await asyncio.wait({one}, timeout=after_s)
        if not one.done() and field.winner is None and (other := second()) is not None:
            await _either(field, one, field.start(other))
        else:
            await one
    finally:
        await field.stop()


async def _either(field: _Race, one: asyncio.Task[None], two: asyncio.Task[None]) -> None:
    pending = {one, two}
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            has_won = field.winner is not None and field.tasks[field.winner] is task
            if has_won or (not task.cancelled() and task.exception() is None):
                return task.result()
    return one.result() if not one.cancelled() else two.result()
