"""What the handlers need of one configuration; a reload puts another one in its place.

Calls keep the service that they began with, so a reload never changes a call under way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from router.api.guard import Guard
from router.backends.base import Backend, Probe
from router.core.chat_request import ImageRules
from router.core.model_name import LadderNames
from router.flow.board import Board
from router.flow.cache import Cache
from router.flow.embedding import Batches
from router.flow.events import Events
from router.flow.issuing import Issuer
from router.flow.keys import KeyBook
from router.flow.ledger import Ledger
from router.flow.observe import Observer
from router.flow.pipeline import Pipeline
from router.flow.renewal import Books
from router.flow.reuse import Reuse
from router.flow.tasks import Tasks
from router.store.base import Store

# Turns the token ids of one input into its text; None where the tokenizer is not installed.
DecodeTokens = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """The server's limits of size (bytes) and time (seconds)."""

    body_bytes_max: int
    body_s: float
    keepalive_s: float
    images: ImageRules


@dataclass(frozen=True, slots=True)
class Service:
    """One configuration, ready to serve."""

    names: LadderNames
    guard: Guard
    pipeline: Pipeline
    backends: Mapping[str, Backend]
    limits: ServerLimits
    hub_secret: str | None
    ops_need_key: bool
    decode_tokens: DecodeTokens | None
    started_at: int
    cache: Cache

    def note_probe(self, backend: str, probe: Probe) -> None:
        """Whatever an old revision of the backend's model answered is of no use any more."""
        if probe.revision:
            ladders = self.names.ladders.values()
            rungs = {rung.name for one in ladders for rung in one.rungs if rung.backend == backend}
            self.cache.note_revision(backend, probe.revision, rungs)


@dataclass(slots=True)
class Shared:
    """What outlives a reload: the accounts, the board, the counters, the background tasks, and the
    way to the other workers.
    """

    board: Board
    store: Store
    books: Books
    ledger: Ledger
    keys: KeyBook
    issuer: Issuer
    reuse: Reuse
    batches: Batches
    observer: Observer
    tasks: Tasks
    clock: Callable[[], float]
    events: Events = field(default_factory=Events)
    is_draining: bool = False
