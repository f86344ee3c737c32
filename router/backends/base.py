"""What every backend can do: the seam between the pipeline and the wire protocols.

A backend turns an attempt (a call at one rung) into its own wire protocol and the answer back into
OpenAI's shape. It raises only `UpstreamError`s. It has no clock of its own: the flow limits each
phase, and cancels. A stream that is closed before its end closes its connection at once.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from router.config.secrets import Credential
from router.core.batch import Limits
from router.types import Abilities, Answer, Call, ChatCall, EmbedCall, Embeddings, Price, Rung


@dataclass(slots=True)
class ChatAttempt:
    """`answer_bytes_max` bounds a non-streamed answer and any one event of a stream."""

    call: ChatCall
    rung: Rung
    connect_s: float
    answer_bytes_max: int = 64 << 20


@dataclass(slots=True)
class EmbedAttempt:
    call: EmbedCall
    rung: Rung
    connect_s: float
    answer_bytes_max: int = 64 << 20


# For servers that say nothing of theirs: what is too much is found by halving.
EMBED_LIMITS = Limits(count_max=256, tokens_max=200_000)


class EventKind(enum.Enum):
    CHUNK = "chunk"
    DONE = "done"
    COMMENT = "comment"


class Event(NamedTuple):
    """One event of a streamed answer.

    CHUNK: `data` is one chunk's JSON as it came (repairs are the relay's). DONE: the upstream said
    `[DONE]`. COMMENT: `data` is text to show while the caller waits, such as a place in a queue.
    """

    kind: EventKind
    data: bytes


# Takes bytes of a stream that begin with an event, all of them or none; whether it did.
Take = Callable[[bytes], bool]


class EventStream(Protocol):
    """An open streamed answer."""

    async def read(self, take: Take | None = None) -> list[Event]:
        """All events of the next upstream read, never empty before the end; [] at the clean end.

        What arrives while it waits may be offered to `take`, and is no part of what it returns
        where that takes it. Raises UpstreamError when the stream is cut, malformed or reports an
        error.
        """
        ...

    def close(self) -> None:
        """Leave; before the end this cancels the upstream. May be called more than once."""
        ...


class State(enum.StrEnum):
    """How a backend looked at its last probe."""

    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"
    ASLEEP = "asleep"
    STARTING = "starting"


@dataclass(frozen=True, slots=True)
class Probe:
    """What a probe found: `models` and `prices` map a model's name to what is said of it.

    `revision`: of the one model that is served, "" where the server does not say.
    """

    state: State
    reason: str = ""
    models: Mapping[str, Abilities] = field(default_factory=dict)
    prices: Mapping[str, Price] = field(default_factory=dict)
    revision: str = ""


class Backend(Protocol):
    """One configured upstream."""

    name: str
    kind: str
    credential: Credential
    takes_key_tokens: bool
    """Whether a key's own token goes before the backend's here."""

    may_repeat: bool
    """Whether what failed after it was sent may be sent again: not where it runs on unheard."""

    can_continue: bool
    """Whether its servers may be asked to go on with a message of the assistant's that was begun.
    Whether a rung's model then does is for a canary to show (`flow/continuity.py`)."""

    @property
    def embed_limits(self) -> Limits:
        """What one embeddings request may hold, and how many inputs may be there at once."""
        ...

    def unable(self, call: Call, rung: Rung) -> str | None:
        """Why this call cannot be put faithfully to this rung, or None. Pure; asked while planning.

        Only what follows from the protocol: abilities, limits and state are the plan's.
        """
        ...

    async def stream_chat(self, attempt: ChatAttempt) -> EventStream:
        """Open a streamed answer; returns when the upstream's headers are here and good."""
        ...

    async def complete_chat(self, attempt: ChatAttempt) -> Answer:
        """A whole answer in OpenAI's shape."""
        ...

    async def embed(self, attempt: EmbedAttempt) -> Embeddings:
        """One vector for each input of the call, in order."""
        ...

    async def probe(self) -> Probe:
        """A cheap look without side effects (it must not wake, load or bill anything)."""
        ...

    async def aclose(self) -> None: ...
