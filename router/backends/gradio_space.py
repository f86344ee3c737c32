"""kind = "gradio-space": an endpoint of a Gradio app, on the Hub or at an address.

A job is posted to `queue/join` and followed on `queue/data`, which Gradio 4, 5 and 6 speak alike.
From the post on it runs, and charges its ZeroGPU quota, whether anybody listens or not. So nothing
here posts twice, and a job that is left before its end is called off: closing the stream stops a
generator, and only `/cancel` a job that waits or was just posted.

A token goes out only where the backend's configuration has one, a key's own likewise: the headers
of a post are visible to the Space's code, and so to its author.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from router.backends.base import (
    EMBED_LIMITS,
    ChatAttempt,
    EmbedAttempt,
    EventStream,
    Probe,
    State,
)
from router.backends.gradio_job import Job, SpaceStream
from router.backends.openai_wire import JSON_HEADERS, encode
from router.config.secrets import Credential
from router.core import answers, gradio, gradio_inputs
from router.core.embeddings import estimate_tokens, join
from router.core.gradio_inputs import Endpoint, Published, Template
from router.errors import (
    RungRefused,
    UpstreamAsleep,
    UpstreamBroken,
    UpstreamError,
    UpstreamFailed,
    UpstreamTimeout,
)
from router.hub.spaces import Runtime, Spaces, Standing
from router.transport.http import HttpClient, HttpResponse
from router.types import Answer, Call, ChatCall, Embeddings, Json, Key, Rung, Task, Usage

# A redeployed Space numbers its functions anew without a word, so what it published is asked again.
_PUBLISHED_AGE_S_MAX = 300.0
_DOCUMENT_BYTES_MAX = 16 << 20
_CONTROL_BYTES_MAX = 1 << 20
_CONTROL_S = 30.0
_CANCEL_S = 5.0
_FAREWELLS_MAX = 256
_FAREWELLS_S = 2.0

# Where a text box takes the texts of an embeddings call, each text is a job of its own.
_SINGLE_TEXTS_MAX = 64
_SINGLE_JOBS_AT_ONCE = 4

# A Space takes from seconds to minutes to start; others answer meanwhile.
_STARTING_COOL_S = 10.0
_PAUSED_COOL_S = 120.0
_DEAD_COOL_S = 60.0

_STATES = {
    Standing.CALLABLE: State.UP,
    Standing.STARTING: State.STARTING,
    Standing.ASLEEP: State.ASLEEP,
    Standing.PAUSED: State.ASLEEP,
    Standing.DEAD: State.DOWN,
    Standing.UNKNOWN: State.UNKNOWN,
}


@dataclass(frozen=True, slots=True)
class _Site:
    """A Space as it was found: where its queue's routes begin, what it publishes, and when."""

    base: str
    published: Published
    at_s: float


class _Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class GradioSpaceBackend:
    """One Space: `space` names it on the Hub, or `url` is where its app is served.

    `inputs` maps the endpoint's inputs to templates; None: mapped from what the Space publishes.
    """

    kind = "gradio-space"
    takes_key_tokens = True
    may_repeat = False
    can_continue = False
    embed_limits = EMBED_LIMITS

    def __init__(
        self,
        name: str,
        *,
        url: str | None,
        space: str | None,
        api_name: str | None,
        inputs: Mapping[str, Template] | None,
        client: HttpClient,
        credential: Credential,
        spaces: Spaces,
    ) -> None:
        if url is None and space is None:
            raise ValueError("a gradio-space backend needs a url or a space")
        self.name = name
        self.credential = credential
        self._url = url.rstrip("/") if url else None
        self._space = None if url else space
        self._api_name = api_name
        self._inputs = dict(inputs or {})
        self._client = client
        self._spaces = spaces
        self._host: str | None = None
        self._site: _Site | None = None
        self._joins: set[asyncio.Task[str]] = set()
        self._farewells: set[asyncio.Task[None]] = set()

    def unable(self, call: Call, rung: Rung) -> str | None:
        if isinstance(call, ChatCall):
            return gradio_inputs.unable_chat(call.body)
        if call.is_tokens:
            return "a Space takes texts, not token ids"
        if call.dimensions is not None:
            return "a Space cannot be asked for a number of dimensions"
        return None

    async def stream_chat(self, attempt: ChatAttempt) -> EventStream:
        job, _ = await self._start_chat(attempt)
        return SpaceStream(job, attempt)

    async def complete_chat(self, attempt: ChatAttempt) -> Answer:
        job, asked = await self._start_chat(attempt)
        text = gradio.text_of(await job.outcome(), who=attempt.rung.name)
        usage = gradio.estimated_usage(asked, text)
        body = answers.build(
            call_id=attempt.call.id,
            created=int(time.time()),
            model=attempt.rung.model,
            text=text,
            usage=usage,
        )
        return Answer(body, usage)

    async def embed(self, attempt: EmbedAttempt) -> Embeddings:
        call, who = attempt.call, attempt.rung.name
        texts = [text for text in call.inputs if isinstance(text, str)]
        if len(texts) != len(call.inputs):
            raise RungRefused(f"{who} takes texts, not token ids")
        headers = self._headers(call.key)
        site = await self._find_site(headers, attempt)
        endpoint = gradio_inputs.choose_endpoint(
            site.published, self._api_name, Task.EMBEDDINGS, who=who
        )

        async def vectors(some: list[str]) -> Embeddings:
            data = gradio_inputs.fill_embed(endpoint, some, self._inputs, who=who)
            job = await self._post(site, endpoint, data, headers, attempt)
            usage = Usage(estimate_tokens(some), estimated=True)
            return gradio.vectors_of(await job.outcome(), len(some), who=who, usage=usage)

        if len(texts) == 1 or gradio_inputs.takes_lists(endpoint, self._inputs):
            return await vectors(texts)
        if len(texts) > _SINGLE_TEXTS_MAX:
            raise RungRefused(
                f"{who} takes one text a job, and {len(texts)} texts are more than the "
                f"{_SINGLE_TEXTS_MAX} jobs that one call may post"
            )
        return join(await _each(texts, vectors))

    async def probe(self) -> Probe:
        """A Space's stage from the Hub alone: a request to the Space would wake it, or keep it up.

        At a plain address `/config`, which runs nothing.
        """
        try:
            if self._space is not None:
                runtime = await self._spaces.runtime(self._space, self.credential.headers())
                return Probe(_STATES[runtime.standing], runtime.words)
            reply = await self._get(f"{self._url}/config", self.credential.headers())
            if reply.status != 200:
                error = gradio.refusal_of(self.name, *reply)
                return Probe(State.DOWN, f"/config: {error.message}")
            gradio_inputs.read_prefix(_parsed(reply.body), who=self.name)
        except UpstreamError as error:
            return Probe(State.DOWN, error.message)
        return Probe(State.UP)

    async def aclose(self) -> None:
        """Gives the last farewells a moment; the client belongs to the composition root."""
        tasks = [*self._joins, *self._farewells]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_FAREWELLS_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, *self._farewells, return_exceptions=True)

    # --- finding the Space ----------------------------------------------------------------------

    async def _find_site(
        self, headers: Mapping[str, str], attempt: ChatAttempt | EmbedAttempt
    ) -> _Site:
        """What the Space publishes and where, asked again now and then. Raises UpstreamError."""
        now_s = asyncio.get_running_loop().time()
        site = self._site
        if site is not None and now_s - site.at_s <= _PUBLISHED_AGE_S_MAX:
            return site
        who = attempt.rung.name
        if self._space is not None:
            await self._require_callable(who, headers)
        host = self._url or await self._find_host(headers)
        config = await self._document(f"{host}/config", who, headers, attempt.connect_s)
        prefix = gradio_inputs.read_prefix(config, who=who)
        info = await self._get(f"{host}{prefix}/info", headers, attempt.connect_s)
        described = _parsed(info.body) if info.status == 200 else None
        published = gradio_inputs.read_published(config, described, who=who)
        self._site = _Site(host + prefix, published, now_s)
        return self._site

    async def _find_host(self, headers: Mapping[str, str]) -> str:
        assert self._space is not None
        if self._host is None:
            self._host = await self._spaces.host(self._space, headers)
        return self._host

    async def _document(
        self, url: str, who: str, headers: Mapping[str, str], connect_s: float
    ) -> Any:
        reply = await self._get(url, headers, connect_s)
        value = _parsed(reply.body) if reply.status == 200 else None
        if isinstance(value, dict):
            return value
        if reply.status in (200, 404):
            error: UpstreamError = UpstreamBroken(
                f"{who} has no Gradio app: its /config answered {reply.status} without one"
            )
        else:
            error = gradio.refusal_of(who, *reply)
        raise await self._explained(error, reply, who, headers)

    async def _require_callable(self, who: str, headers: Mapping[str, str]) -> None:
        """Raises where the Hub says that the Space does not run; its silence stops nobody."""
        assert self._space is not None
        try:
            runtime = await self._spaces.runtime(self._space, headers)
        except RungRefused:
            raise
        except UpstreamError:
            return
        error = await self._unwell(runtime, who, headers)
        if error is not None:
            raise error

    async def _explained(
        self, error: UpstreamError, reply: _Reply, who: str, headers: Mapping[str, str]
    ) -> UpstreamError:
        """The error, or what the Hub knows to be behind it; what was published may hold no more."""
        self._site = None
        about_the_space = (
            reply.status == 404
            or reply.status >= 500
            or reply.status < 400
            or not isinstance(_parsed(reply.body), dict)
        )
        if self._space is None or not about_the_space:
            return error
        try:
            runtime = await self._spaces.runtime(self._space, headers)
        except UpstreamError:
            return error
        return await self._unwell(runtime, who, headers) or error

    async def _unwell(
        self, runtime: Runtime, who: str, headers: Mapping[str, str]
    ) -> UpstreamError | None:
        """The error that a stage stands for, having sent the request that wakes a sleeping one."""
        match runtime.standing:
            case Standing.ASLEEP:
                self._farewell(self._spaces.wake(await self._find_host(headers), headers))
                return UpstreamAsleep(
                    f"{who} sleeps ({runtime.words}) and is being woken", cool_s=_STARTING_COOL_S
                )
            case Standing.STARTING:
                return UpstreamAsleep(
                    f"{who} is starting: {runtime.words}", cool_s=_STARTING_COOL_S
                )
            case Standing.PAUSED:
                return UpstreamAsleep(
                    f"{who} is paused: only its owner can restart the Space", cool_s=_PAUSED_COOL_S
                )
            case Standing.DEAD:
                return UpstreamFailed(
                    f"{who} is out of order: {runtime.words}", cool_s=_DEAD_COOL_S
                )
            case _:
                return None

    # --- posting a job --------------------------------------------------------------------------

    async def _start_chat(self, attempt: ChatAttempt) -> tuple[Job, str]:
        """The job of a chat call, and the text that it asks about."""
        call, who = attempt.call, attempt.rung.name
        headers = self._headers(call.key)
        site = await self._find_site(headers, attempt)
        endpoint = gradio_inputs.choose_endpoint(site.published, self._api_name, Task.CHAT, who=who)
        asked = gradio_inputs.asked_of_chat(call.body)
        data = gradio_inputs.fill_chat(endpoint, asked, self._inputs, who=who)
        return await self._post(site, endpoint, data, headers, attempt), asked.all_text

    async def _post(
        self,
        site: _Site,
        endpoint: Endpoint,
        data: list[Any],
        headers: Mapping[str, str],
        attempt: ChatAttempt | EmbedAttempt,
    ) -> Job:
        """Post a job, once, and open its stream. Raises UpstreamError."""
        who = attempt.rung.name
        ticket = {"fn_index": endpoint.fn_index, "session_hash": secrets.token_hex(8)}
        body: Json = {"data": data, **ticket, "event_data": None, "trigger_id": None}
        joining = asyncio.get_running_loop().create_task(
            self._join(site, encode(body), headers, who, attempt.connect_s)
        )
        self._joins.add(joining)
        joining.add_done_callback(self._joins.discard)
        try:
            event_id = await asyncio.shield(joining)
        except asyncio.CancelledError:
            # Whether the post arrived is not known yet: only its answer names the job to call off.
            self._farewell(self._call_off_late(joining, site, ticket, headers))
            raise

        def call_off() -> None:
            self._farewell(self._call_off(site, {**ticket, "event_id": event_id}, headers))

        try:
            response = await self._open_events(site, ticket, headers, who, attempt.connect_s)
        except BaseException:
            call_off()
            raise
        watch = gradio.JobWatch(
            who=who,
            event_id=event_id,
            output_index=endpoint.output_index,
            bytes_max=attempt.answer_bytes_max,
        )
        return Job(response, watch, who, attempt.answer_bytes_max, call_off)

    async def _join(
        self, site: _Site, body: bytes, headers: Mapping[str, str], who: str, connect_s: float
    ) -> str:
        reply = await self._ask(
            "POST", f"{site.base}/queue/join", headers, body=body, connect_s=connect_s
        )
        if not 200 <= reply.status < 300:
            error = gradio.refusal_of(who, *reply)
            raise await self._explained(error, reply, who, headers)
        value = _parsed(reply.body)
        event_id = value.get("event_id") if isinstance(value, dict) else None
        if not isinstance(event_id, str):
            broken = UpstreamBroken(f"{who} answered queue/join without an event id")
            raise await self._explained(broken, reply, who, headers)
        return event_id

    async def _open_events(
        self, site: _Site, ticket: Json, headers: Mapping[str, str], who: str, connect_s: float
    ) -> HttpResponse:
        response = await self._client.send(
            "GET",
            f"{site.base}/queue/data?session_hash={ticket['session_hash']}",
            headers={"Accept": "text/event-stream", **headers},
            connect_s=connect_s,
        )
        if response.status == 200 and response.content_type == "text/event-stream":
            return response
        async with response:
            self._site = None
            if response.status == 200:
                kind = response.content_type or "nothing"
                raise UpstreamBroken(f"{who} answered queue/data with {kind}, not an event stream")
            body = await response.read_all(_CONTROL_BYTES_MAX)
            reply = _Reply(response.status, response.headers, body)
        raise await self._explained(gradio.refusal_of(who, *reply), reply, who, headers)

    # --- calling a job off ----------------------------------------------------------------------

    async def _call_off(self, site: _Site, ticket: Json, headers: Mapping[str, str]) -> None:
        """As well as can be: a plain function that already runs goes on to its end."""
        try:
            await self._client.fetch(
                "POST",
                f"{site.base}/cancel",
                headers={**JSON_HEADERS, **headers},
                body=encode(ticket),
                bytes_max=_CONTROL_BYTES_MAX,
                within_s=_CANCEL_S,
            )
        except UpstreamError:
            return

    async def _call_off_late(
        self, joining: asyncio.Task[str], site: _Site, ticket: Json, headers: Mapping[str, str]
    ) -> None:
        try:
            event_id = await joining
        except UpstreamError:
            return
        await self._call_off(site, {**ticket, "event_id": event_id}, headers)

    def _farewell(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it in the background, ended by `aclose`; flow's Tasks is above this layer."""
        if len(self._farewells) >= _FAREWELLS_MAX:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work, name=f"farewell of {self.name}")
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    # --- small exchanges ------------------------------------------------------------------------

    def _headers(self, key: Key) -> dict[str, str]:
        return {} if self.credential.reference is None else self.credential.headers(key.token)

    async def _get(
        self, url: str, headers: Mapping[str, str], connect_s: float = _CONTROL_S
    ) -> _Reply:
        return await self._ask(
            "GET", url, headers, connect_s=connect_s, bytes_max=_DOCUMENT_BYTES_MAX
        )

    async def _ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        body: bytes | None = None,
        connect_s: float,
        bytes_max: int = _CONTROL_BYTES_MAX,
    ) -> _Reply:
        kinds = JSON_HEADERS if body is not None else {"Accept": "application/json"}
        try:
            async with asyncio.timeout(_CONTROL_S):
                response = await self._client.send(
                    method, url, headers={**kinds, **headers}, body=body, connect_s=connect_s
                )
                async with response:
                    read = await response.read_all(bytes_max)
                    return _Reply(response.status, response.headers, read)
        except TimeoutError as error:
            raise UpstreamTimeout(
                f"no answer within {_CONTROL_S:g} s on {method} {url}", phase="answer"
            ) from error


async def _each(
    texts: list[str], vectors: Callable[[list[str]], Awaitable[Embeddings]]
) -> list[Embeddings]:
    """The vectors of each text by itself, a few at once; the first failure calls off the others."""
    room = asyncio.Semaphore(_SINGLE_JOBS_AT_ONCE)

    async def one(text: str) -> Embeddings:
        async with room:
            return await vectors([text])

    failed: list[BaseException] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(text)) for text in texts]
    except* UpstreamError as several:
        failed += several.exceptions
    if failed:
        raise failed[0]
    return [task.result() for task in tasks]


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
