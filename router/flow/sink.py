"""Where a call's answer goes: the seam between the flow and the server that the client talks to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from router.errors import RouterError
from router.types import Answer, Embeddings, Rung


@dataclass(slots=True)
class Provenance:
    """Whom an answer comes from, for the response headers; `rung` None: not known yet.

    `cost_nanousd` None: not known before the answer's end. `is_short`: it could be no longer for
    want of its payer's money.
    """

    rung: Rung | None
    attempts: int
    clamped_to: int | None = None
    cost_nanousd: int | None = None
    is_short: bool = False


class Sink(Protocol):
    """One client's answer. Writing waits while the client does not read (backpressure)."""

    @property
    def is_committed(self) -> bool:
        """Content has gone out: no other rung may take over."""
        ...

    @property
    def is_started(self) -> bool:
        """Headers have gone out: an error can only be an event of the stream."""
        ...

    async def send_answer(self, answer: Answer, provenance: Provenance) -> None: ...

    async def send_embeddings(self, answer: Embeddings, provenance: Provenance) -> None: ...

    async def write(self, frames: bytes, provenance: Provenance) -> None:
        """Send SSE frames that carry content, with the headers before the first of them."""
        ...

    def write_now(self, frames: bytes) -> bool:
        """More of a stream whose content has begun, where that needs no wait. False, and nothing
        was sent: it is for `write`."""
        ...

    async def comment(self, frame: bytes) -> None:
        """Send a comment while the caller waits; it commits nothing."""
        ...

    async def end(self, frames: bytes, provenance: Provenance) -> None:
        """The stream ended well: its last frames, and what it cost."""
        ...

    async def cut(self, frames: bytes, provenance: Provenance) -> bool:
        """Who pays can pay no more: these frames end the answer for him. Whether it goes on for
        somebody else, who pays now; where it does not, nothing was sent."""
        ...

    async def fail(self, error: RouterError) -> None:
        """End a started stream by one error event and a closed connection."""
        ...

    def when_left(self, act: Callable[[], None] | None) -> None:
        """What happens from now on when the client leaves: `act` is called, once, on the spot, and
        must not raise. None, as from the beginning: the task that serves the call is cancelled.
        """
        ...
