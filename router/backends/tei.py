"""kind = "tei": text-embeddings-inference, by its OpenAI route and, where that ignores what the
request says (`normalize`, `truncate`, `prompt_name`), by its native one.

A request with more inputs than the server takes at once goes as several, and every input of this
process holds one of the server's permits while it is there; both limits are learned from `/info`,
and the first also from the server's refusal. With `auto_truncate`, TEI's default, the server cuts
an input that is too long without a word; only its owner can change that.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson

from router.backends import openai_wire
from router.backends.base import ChatAttempt, EmbedAttempt, EventStream, Probe, State
from router.config.secrets import Credential
from router.core import embeddings, tei
from router.core.batch import Limits
from router.errors import CallerMistake, PromptTooLong, RungRefused, UpstreamError
from router.transport.http import HttpClient
from router.types import Answer, Call, ChatCall, Embeddings, Json, Rung, Usage

_NO_CHAT = "TEI serves no chat"
# How many requests of one call are under way at once; TEI makes its own batches of what is there.
_SLICES_IN_FLIGHT_MAX = 4
# The server has to be started with another model before it can do otherwise.
_WRONG_MODEL_COOL_S = 60.0
# A longer count is none; Python refuses to read thousands of digits at all.
_COUNT_DIGITS_MAX = 12


class TeiBackend:
    """One TEI server. `url` is its base, with or without `/v1`."""

    kind = "tei"
    takes_key_tokens = False
    may_repeat = True
    can_continue = False

    def __init__(self, name: str, url: str, client: HttpClient, *, credential: Credential) -> None:
        self.name = name
        self._base = url.rstrip("/").removesuffix("/v1")
        self._client = client
        self.credential = credential
        self._batch_max = tei.Limits().slice_max
        self._permits = Permits(tei.Limits().permits)
        self._complaint: str | None = None

    @property
    def embed_limits(self) -> Limits:
        # The server makes its own batches, and requests of several slices are cut here.
        permits = max(1, self._permits.total)
        return Limits(count_max=min(permits, 4 * self._batch_max), in_flight_max=permits)

    def unable(self, call: Call, rung: Rung) -> str | None:
        return _NO_CHAT if isinstance(call, ChatCall) else None

    async def stream_chat(self, attempt: ChatAttempt) -> EventStream:
        raise RungRefused(f"{attempt.rung.name}: {_NO_CHAT}")

    async def complete_chat(self, attempt: ChatAttempt) -> Answer:
        raise RungRefused(f"{attempt.rung.name}: {_NO_CHAT}")

    async def embed(self, attempt: EmbedAttempt) -> Embeddings:
        if self._complaint is not None:
            raise RungRefused(
                f"{attempt.rung.name}: {self._complaint}",
                code="upstream_model",
                cool_s=_WRONG_MODEL_COOL_S,
            )
        try:
            return await self._embed_in_known_slices(attempt)
        except PromptTooLong as error:
            error.param = "input"
            raise

    async def probe(self) -> Probe:
        """`/info` needs the key, so this also tells whether ours is right."""
        try:
            status, _, body = await self._fetch("/info")
            if status in (401, 403):
                return Probe(State.DOWN, f"/info answered {status}: is the token right?")
            if status != 200:
                return Probe(State.DOWN, f"/info answered {status}: is this a TEI server?")
            info = tei.info_in(_parsed(body))
            if info is None:
                return Probe(State.DOWN, "/info is not TEI's: is this another kind of server?")
            status, _, _ = await self._fetch("/health")
        except UpstreamError as error:
            return Probe(State.DOWN, error.message)
        self._batch_max = info.limits.slice_max
        self._permits.resize(info.limits.permits)
        self._complaint = info.complaint
        models = dict.fromkeys(info.models, info.abilities)
        if status != 200:
            return Probe(State.DOWN, f"/health answered {status}", models)
        return Probe(State.UP, info.complaint or "", models, revision=info.revision)

    async def aclose(self) -> None:
        """The client belongs to the composition root."""

    async def _fetch(self, path: str) -> tuple[int, Any, bytes]:
        return await self._client.fetch("GET", self._base + path, headers=self.credential.headers())

    async def _embed_in_known_slices(self, attempt: EmbedAttempt) -> Embeddings:
        """Once more, if the server names another batch limit than we knew when it refuses."""
        batch_max = self._batch_max
        try:
            return await self._embed_in_slices(attempt)
        except CallerMistake as error:
            told = tei.batch_limit_in(error.message)
            if told is None or told >= batch_max:
                raise
            self._batch_max = told
        return await self._embed_in_slices(attempt)

    async def _embed_in_slices(self, attempt: EmbedAttempt) -> Embeddings:
        """The slices' answers in order. The first failure cancels the others and is the call's."""
        inputs = attempt.call.inputs
        cuts = tei.slices(inputs, self._batch_max, tei.BODY_BYTES_MAX)
        if len(cuts) == 1:
            return await self._embed_slice(attempt, inputs)
        room = asyncio.Semaphore(_SLICES_IN_FLIGHT_MAX)

        async def one(cut: slice) -> Embeddings:
            async with room:
                return await self._embed_slice(attempt, inputs[cut])

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(cut)) for cut in cuts]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return embeddings.join([task.result() for task in tasks])

    async def _embed_slice(
        self, attempt: EmbedAttempt, inputs: list[str] | list[list[int]]
    ) -> Embeddings:
        call, who = attempt.call, attempt.rung.name
        native = tei.native_body(inputs, call.extra, call.dimensions)
        async with self._permits.held(len(inputs)):
            if native is not None:
                answer = await self._native(attempt, native, len(inputs))
            else:
                body = {**openai_wire.embed_body(attempt), "input": inputs}
                raw = await openai_wire.post_json(
                    self._client,
                    f"{self._base}/v1/embeddings",
                    self.credential.headers(),
                    body,
                    attempt,
                )
                answer = embeddings.read_openai(raw, len(inputs), who=who)
        if answer.usage.estimated:
            counted = Usage(embeddings.estimate_tokens(inputs), estimated=True)
            return Embeddings(answer.vectors, counted)
        return answer

    async def _native(self, attempt: EmbedAttempt, body: Json, count: int) -> Embeddings:
        """By `/embed`, whose answer is bare vectors and the token count a header."""
        who = attempt.rung.name
        response = await self._client.send(
            "POST",
            f"{self._base}/embed",
            headers={**openai_wire.JSON_HEADERS, **self.credential.headers()},
            body=openai_wire.encode(body),
            connect_s=attempt.connect_s,
        )
        async with response:
            await openai_wire.require_ok(response, who)
            told = response.headers.get("x-compute-tokens", "")
            raw = await response.read_all(attempt.answer_bytes_max)
        is_count = told.isascii() and told.isdigit() and len(told) <= _COUNT_DIGITS_MAX
        usage = Usage(int(told)) if is_count else None
        return embeddings.read_nested(raw, count, who=who, usage=usage)


class Permits:
    """A server's permits as far as this process knows: taken in the order they were asked for.

    Whoever waits is a call that the flow limits in number and in time.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def total(self) -> int:
        return self._total

    def resize(self, total: int) -> None:
        self._total = total
        self._admit()

    @asynccontextmanager
    async def held(self, count: int) -> AsyncIterator[None]:
        """`count` permits, waited for; more than there are count as all of them."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # The permits came in the same turn of the loop as the cancellation.
                self._give_back(count)
            else:
                self._admit()
            raise
        try:
            yield
        finally:
            self._give_back(count)

    def _give_back(self, count: int) -> None:
        self._taken -= count
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            count, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
                continue
            if self._taken and self._taken + count > self._total:
                return
            self._waiting.popleft()
            self._taken += count
            turn.set_result(None)


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
