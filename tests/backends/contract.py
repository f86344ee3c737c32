"""What every backend must do, whatever its wire: the scenarios, and the rig that plays them.

Each kind has a rig in `rigs/`, which starts a fake upstream speaking that kind's documented or
recorded wire and knows how that wire expresses each scenario. `test_contract.py` runs every
scenario against every rig. A kind that cannot express a scenario leaves it out of `plays`, with the
reason beside it.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import orjson

from router.backends.base import Backend, ChatAttempt, EmbedAttempt, Event, EventKind, EventStream
from router.core.chunks import ChunkWatch
from router.transport.http import HttpClient
from router.types import ChatCall, EmbedCall, Key, Ladder, Needs, Policy, Rung, Task
from tests.fakes.upstream import FakeUpstream

# What a good chat answer says, in these pieces when it is streamed.
PIECES = ["Hello", " there,", " wörld", " \U0001f600!"]
TEXT = "".join(PIECES)


class Scenario(enum.Enum):
    """How the upstream behaves towards the next requests."""

    GOOD = "answers well"
    BUSY = "429, with Retry-After: 7 where the wire can carry it"
    FAILED = "5xx or the kind's own word for a failure"
    HTML = "an HTML page with status 502"
    REDIRECT = "302 to another host"
    UNAUTHORIZED = "our token is refused"
    TOO_LONG = "the prompt does not fit, in this kind's own words"
    MISTAKE = "the request itself is wrong, in this kind's own words"
    ERROR_FIRST = "a 200 stream whose first event is an error"
    CUT = "a stream that is cut after its first piece"
    ENDLESS = "a stream that never ends after its first piece"
    NOT_JSON = "200 with a body that is not what was asked for"
    WRONG_COUNT = "an embeddings answer with a vector missing"


def vector_of(text: str, dimensions: int = 8) -> list[float]:
    """A unit vector that is a function of its text, exact in float32 to within 1e-7."""
    values = [math.sin(sum(text.encode()) * (i + 1) + len(text)) + 1.1 for i in range(dimensions)]
    norm = math.sqrt(sum(value * value for value in values))
    return [value / norm for value in values]


class Rig(ABC):
    """One kind under test: its backend, its rung, and the upstream that plays the scenarios."""

    kind: str
    tasks: frozenset[Task] = frozenset({Task.CHAT})
    plays: frozenset[Scenario] = frozenset(Scenario)
    # Whether the answer to a good chat comes with the upstream's own token counts.
    reports_usage = True

    def __init__(self) -> None:
        self.scenario = Scenario.GOOD

    @abstractmethod
    async def handle(self, request: Any, reply: Any) -> None:
        """Speak the kind's wire, as `self.scenario` says."""

    @abstractmethod
    def backend(self, url: str, client: HttpClient) -> Backend:
        """The backend under test, pointed at the fake upstream."""

    @abstractmethod
    def rung(self, task: Task) -> Rung:
        """The rung for calls of this task."""

    @asynccontextmanager
    async def up(self) -> AsyncIterator[tuple[Backend, FakeUpstream]]:
        client = HttpClient()
        try:
            async with FakeUpstream(self.handle) as upstream:
                backend = self.backend(upstream.url, client)
                try:
                    yield backend, upstream
                finally:
                    await backend.aclose()
        finally:
            await client.aclose()


def chat_attempt(rung: Rung, *, stream: bool = False, **fields: Any) -> ChatAttempt:
    body = {"model": "ladder", "messages": [{"role": "user", "content": "Hi?"}], **fields}
    ladder = Ladder("ladder", Task.CHAT, (rung,))
    call = ChatCall(
        id="chatcmpl-test",
        key=Key("tester"),
        ladder=ladder,
        policy=Policy.ORDER,
        body=body,
        stream=stream,
        wants_usage=False,
        needs=Needs(),
    )
    return ChatAttempt(call, rung, connect_s=2.0)


def embed_attempt(rung: Rung, inputs: list[str] | list[list[int]], **fields: Any) -> EmbedAttempt:
    call = EmbedCall(
        id="embed-test",
        key=Key("tester"),
        ladder=Ladder("embed", Task.EMBEDDINGS, (rung,)),
        policy=Policy.ORDER,
        inputs=inputs,
        needs=Needs(),
        **fields,
    )
    return EmbedAttempt(call, rung, connect_s=2.0)


async def read_to_end(stream: EventStream) -> list[Event]:
    events: list[Event] = []
    while batch := await stream.read():
        events += batch
    return events


def text_of(events: Sequence[Event]) -> tuple[str, ChunkWatch]:
    """The text that a stream's chunks add up to, and the watch that followed them."""
    watch = ChunkWatch(who="rig", call_id="chatcmpl-test", wants_usage=True)
    text = ""
    for event in events:
        if event.kind is EventKind.CHUNK:
            seen = watch.see(event.data)
            text += _delta_text(seen.payload)
    return text, watch


def _delta_text(payload: bytes | None) -> str:
    if payload is None:
        return ""
    choices = orjson.loads(payload)["choices"]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
