"""kind = "tgi": text-generation-inference, by its OpenAI route.

Requests and streams are translated by `core/tgi.py`. Once it has sent its 200 TGI still refuses
work, for want of a permit or for a prompt that is too long: as the stream's first event, whose
`http_status_code` is always 422 and is not looked at. `/info` and `/health` need no key, so a probe
cannot tell whether ours is right; a wrong one is an empty 401 on the first call.
"""

from __future__ import annotations

from typing import Any

import orjson

from router.backends import openai_wire
from router.backends.base import (
    EMBED_LIMITS,
    ChatAttempt,
    EmbedAttempt,
    Event,
    EventKind,
    EventStream,
    Probe,
    State,
    Take,
)
from router.config.secrets import Credential
from router.core import answers, tgi
from router.errors import RungRefused, UpstreamError
from router.transport.http import HttpClient
from router.types import Answer, Call, ChatCall, Embeddings, Json, Rung

_NO_EMBEDDINGS = "TGI makes no embeddings"


class TgiBackend:
    """One TGI server. `url` is its base, with or without `/v1`."""

    kind = "tgi"
    takes_key_tokens = False
    may_repeat = True
    can_continue = True
    embed_limits = EMBED_LIMITS

    def __init__(self, name: str, url: str, client: HttpClient, *, credential: Credential) -> None:
        self.name = name
        self._base = url.rstrip("/").removesuffix("/v1")
        self._client = client
        self.credential = credential

    def unable(self, call: Call, rung: Rung) -> str | None:
        return tgi.unable(call.body) if isinstance(call, ChatCall) else _NO_EMBEDDINGS

    async def stream_chat(self, attempt: ChatAttempt) -> EventStream:
        opened = await openai_wire.open_stream(
            self._client,
            f"{self._base}/v1/chat/completions",
            self.credential.headers(),
            self._body(attempt, stream=True),
            attempt,
        )
        return TgiStream(opened, tgi.ChunkMender(attempt.call.id))

    async def complete_chat(self, attempt: ChatAttempt) -> Answer:
        raw = await openai_wire.post_json(
            self._client,
            f"{self._base}/v1/chat/completions",
            self.credential.headers(),
            self._body(attempt, stream=False),
            attempt,
        )
        return answers.check(tgi.mend_answer(raw), who=attempt.rung.name, call_id=attempt.call.id)

    async def embed(self, attempt: EmbedAttempt) -> Embeddings:
        raise RungRefused(f"{attempt.rung.name}: {_NO_EMBEDDINGS}")

    async def probe(self) -> Probe:
        """`/health` after its first call is a look at the device only; it generates nothing."""
        try:
            status, _, body = await self._fetch("/info")
            if status != 200:
                return Probe(State.DOWN, f"/info answered {status}: is this a TGI server?")
            info = _parsed(body)
            models = tgi.abilities_in(info)
            if models is None:
                return Probe(State.DOWN, "/info is not TGI's: is this another kind of server?")
            status, _, _ = await self._fetch("/health")
        except UpstreamError as error:
            return Probe(State.DOWN, error.message)
        if status != 200:
            return Probe(State.DOWN, f"/health answered {status}", models)
        return Probe(State.UP, models=models, revision=tgi.revision_in(info))

    async def aclose(self) -> None:
        """The client belongs to the composition root."""

    async def _fetch(self, path: str) -> tuple[int, Any, bytes]:
        return await self._client.fetch("GET", self._base + path, headers=self.credential.headers())

    @staticmethod
    def _body(attempt: ChatAttempt, *, stream: bool) -> Json:
        body = openai_wire.chat_body(attempt.call.body, model=attempt.rung.model, stream=stream)
        return tgi.chat_body(body, model=attempt.rung.model)


class TgiStream:
    """An open TGI stream, its chunks mended on the way."""

    def __init__(self, opened: EventStream, mender: tgi.ChunkMender) -> None:
        self._opened = opened
        self._mender = mender

    async def read(self, take: Take | None = None) -> list[Event]:
        events: list[Event] = []
        for event in await self._opened.read():
            if event.kind is EventKind.CHUNK:
                mended = self._mender.mend(event.data)
                events += [Event(EventKind.CHUNK, payload) for payload in mended]
            else:
                events.append(event)
        return events

    def close(self) -> None:
        self._opened.close()


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
