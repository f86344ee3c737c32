"""kind = "inference-endpoint": one dedicated Hugging Face endpoint, whatever engine it runs.

The engine's own dialect is spoken by the backend of that kind; this one decides whether the
endpoint may be spoken to at all. Its state comes from the management API, and from what a real call
met, never from polling the endpoint: every request there keeps it awake, and billed. An endpoint
scaled to zero is woken once, in the background, while other rungs answer; a paused one is its
owner's to resume.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import orjson

from router.backends.base import (
    EMBED_LIMITS,
    Backend,
    ChatAttempt,
    EmbedAttempt,
    EventStream,
    Probe,
    State,
)
from router.backends.openai import OpenAiBackend
from router.backends.tei import TeiBackend
from router.backends.tgi import TgiBackend
from router.config.secrets import Credential
from router.core.refusal import refusal
from router.errors import (
    ConnectFailed,
    RungRefused,
    UpstreamAsleep,
    UpstreamBroken,
    UpstreamError,
    UpstreamFailed,
)
from router.hub.endpoints import EndpointsApi, EndpointState, EndpointStatus
from router.hub.kept import Kept
from router.transport.http import HttpClient
from router.types import Answer, Call, Embeddings, Key, Rung

_log = logging.getLogger("rungway")

# A running endpoint that stops running says so to the next call, so its state need not be fresh.
_RUNNING_AGE_S_MAX = 30.0
_STATUS_AGE_S_MAX = 5.0
_SECOND_LOOK_AGE_S_MAX = 1.0

# A cold start takes minutes; others answer meanwhile, and this rung is looked at now and then.
_STARTING_COOL_S = 10.0
_FAILED_COOL_S = 60.0
_PAUSED_COOL_S = 120.0

# The proxy holds a request with this header until a replica is ready.
_SCALE_UP_HEADER = "X-Scale-Up-Timeout"
_SCALE_UP_S = 600
_WAKE_MARGIN_S = 30.0
_WAKE_EVERY_S = 30.0
_WAKE_BYTES_MAX = 64 << 10

_INNERS_MAX = 64
_GUESSED_ENGINES = frozenset({"", "custom", "huggingface"})
_DIALECTS: dict[str, type[TgiBackend] | type[TeiBackend] | type[OpenAiBackend]] = {
    "tgi": TgiBackend,
    "tgiNeuron": TgiBackend,
    "tei": TeiBackend,
}

Given = TypeVar("Given")


@dataclass(frozen=True, slots=True)
class Standing:
    """What an endpoint's status means for a call. Only `State.UP` may be called."""

    state: State
    reason: str = ""
    cool_s: float = _STARTING_COOL_S
    failure: type[UpstreamError] = UpstreamAsleep

    def error(self, who: str) -> UpstreamError:
        return self.failure(f"{who}: {self.reason}", cool_s=self.cool_s)


def judge(status: EndpointStatus) -> Standing:
    """The standing of an endpoint in this state. States that are new to us go by its replicas."""
    said = f" ({status.message})" if status.message else ""
    match status.state:
        case EndpointState.PAUSED:
            reason = "the endpoint is paused, and only its owner can resume it"
            return Standing(State.DOWN, reason, _PAUSED_COOL_S)
        case EndpointState.FAILED | EndpointState.UPDATE_FAILED:
            reason = f"the endpoint's state is {status.state}{said}: see its logs on Hugging Face"
            return Standing(State.DOWN, reason, _FAILED_COOL_S, UpstreamFailed)
        case EndpointState.SCALED_TO_ZERO:
            return Standing(State.ASLEEP, "the endpoint is scaled to zero")
    if status.url is not None and (
        status.state == EndpointState.RUNNING or status.ready_replicas > 0
    ):
        return Standing(State.UP)
    return Standing(State.STARTING, f"the endpoint is starting: {status.state}{said}")


class OwnToken(Credential):
    """A key's own token in the place of a backend's."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._value = token


class InferenceEndpointBackend:
    """`endpoint` is namespace/name, by the management API; or only `url`, without one."""

    kind = "inference-endpoint"
    takes_key_tokens = True
    may_repeat = True
    can_continue = False
    embed_limits = EMBED_LIMITS

    def __init__(
        self,
        name: str,
        *,
        endpoint: str | None = None,
        url: str | None = None,
        management_url: str | None = None,
        client: HttpClient,
        credential: Credential,
        scale_up_s: int = _SCALE_UP_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not endpoint and not url:
            raise ValueError("an inference-endpoint needs its `endpoint` or its `url`")
        self.name = name
        self.credential = credential
        self._endpoint = endpoint
        self._url = url.rstrip("/").removesuffix("/v1") if url else None
        self._client = client
        self._api = EndpointsApi(client, management_url)
        self._scale_up_s = scale_up_s
        self._clock = clock
        self._status: Kept[EndpointStatus] = Kept(clock)
        self._guessed: str | None = None
        self._guessing = asyncio.Lock()
        self._inners: OrderedDict[tuple[str, str, str | None], Backend] = OrderedDict()
        self._waking: asyncio.Task[None] | None = None
        self._woken_at: float | None = None

    @property
    def is_waking(self) -> bool:
        return self._waking is not None and not self._waking.done()

    async def wake_ended(self) -> None:
        """Wait until a wake that is under way has ended, well or not."""
        if self._waking is not None:
            await asyncio.wait([self._waking])

    def unable(self, call: Call, rung: Rung) -> str | None:
        url, engine = self._known()
        if url is None or engine is None:
            return None
        return self._inner(url, engine, None).unable(call, rung)

    async def stream_chat(self, attempt: ChatAttempt) -> EventStream:
        return await self._through(attempt, lambda inner: inner.stream_chat(attempt))

    async def complete_chat(self, attempt: ChatAttempt) -> Answer:
        return await self._through(attempt, lambda inner: inner.complete_chat(attempt))

    async def embed(self, attempt: EmbedAttempt) -> Embeddings:
        return await self._through(attempt, lambda inner: inner.embed(attempt))

    async def probe(self) -> Probe:
        """The management API only."""
        if self._endpoint is None:
            reason = (
                "with only a url there is no management API to ask, "
                "and asking the endpoint itself would keep it awake: give `endpoint` as well"
            )
            return Probe(State.UNKNOWN, reason)
        try:
            status = await self._status.get(self._fetch_status, age_s_max=_STATUS_AGE_S_MAX)
        except RungRefused as error:
            return Probe(State.DOWN, error.message)
        except UpstreamError as error:
            return Probe(State.UNKNOWN, error.message)
        standing = judge(status)
        return Probe(standing.state, standing.reason)

    async def aclose(self) -> None:
        """Leaves a wake that is under way; the endpoint goes on starting."""
        if self._waking is not None:
            self._waking.cancel()
            await asyncio.gather(self._waking, return_exceptions=True)

    # --- one call -----------------------------------------------------------------------------

    async def _through(
        self, attempt: ChatAttempt | EmbedAttempt, ask: Callable[[Backend], Awaitable[Given]]
    ) -> Given:
        key = attempt.call.key
        try:
            inner = await self._open(attempt.rung.name, key)
            try:
                return await ask(inner)
            except RungRefused as error:
                if key.token and error.upstream_status in (401, 402, 403):
                    # It says nothing to the keys that use the backend's token.
                    error.cool_s = None
                raise
        except UpstreamError as error:
            other = await self._second_look(attempt.rung.name, error)
            if other is None:
                raise
            raise other from error

    async def _open(self, who: str, key: Key) -> Backend:
        """The backend that speaks to the endpoint for this key. Raises where it is not up."""
        if self._endpoint is None:
            assert self._url is not None
            return self._inner(self._url, await self._engine(self._url, "", key), key.token)
        status = await self._current()
        standing = judge(status)
        if standing.state is not State.UP:
            raise self._refused(who, standing, status)
        assert status.url is not None
        return self._inner(
            status.url, await self._engine(status.url, status.engine, key), key.token
        )

    async def _current(self) -> EndpointStatus:
        """The endpoint's status. A known "running" serves while the management API is silent."""
        known = self._status.value
        if known is None or judge(known).state is not State.UP:
            return await self._status.get(self._fetch_status, age_s_max=_STATUS_AGE_S_MAX)
        if self._status.is_fetching:
            return known
        try:
            return await self._status.get(self._fetch_status, age_s_max=_RUNNING_AGE_S_MAX)
        except UpstreamError:
            return known

    async def _second_look(self, who: str, error: UpstreamError) -> UpstreamError | None:
        """What a failed call really met, if that was an endpoint gone to sleep; else None."""
        if isinstance(error, UpstreamAsleep) or not _may_be_asleep(error):
            return None
        if self._endpoint is None:
            if error.upstream_status not in (502, 503) or error.retry_after_s is not None:
                return None
            reason = f"the endpoint answered {error.upstream_status}: it is asleep or starting"
            return Standing(State.ASLEEP, reason).error(who)
        try:
            status = await self._status.get(self._fetch_status, age_s_max=_SECOND_LOOK_AGE_S_MAX)
        except UpstreamError:
            return None
        standing = judge(status)
        return None if standing.state is State.UP else self._refused(who, standing, status)

    def _refused(self, who: str, standing: Standing, status: EndpointStatus) -> UpstreamError:
        """The error for an endpoint that is not up; one that sleeps is woken meanwhile."""
        if standing.state is State.ASLEEP and status.url is not None:
            self._wake(status.url + status.health_route)
        return standing.error(who)

    async def _fetch_status(self) -> EndpointStatus:
        namespace, _, name = (self._endpoint or "").partition("/")
        return await self._api.state(namespace, name, self.credential.headers())

    # --- waking -------------------------------------------------------------------------------

    def _wake(self, url: str) -> None:
        """Start the endpoint by one held request; where that fails, not again at once."""
        now = self._clock()
        if self.is_waking or (self._woken_at is not None and now - self._woken_at < _WAKE_EVERY_S):
            return
        self._woken_at = now
        _log.info("the backend %s wakes its endpoint %s", self.name, self._endpoint)
        # Kept here and ended by `aclose`; flow's Tasks is above this layer.
        self._waking = asyncio.get_running_loop().create_task(
            self._hold(url), name=f"wake {self.name}"
        )

    async def _hold(self, url: str) -> None:
        """A request that the endpoint's proxy holds until a replica is ready."""
        headers = {**self.credential.headers(), _SCALE_UP_HEADER: str(self._scale_up_s)}
        try:
            status, _, _ = await self._client.fetch(
                "GET",
                url,
                headers=headers,
                bytes_max=_WAKE_BYTES_MAX,
                within_s=self._scale_up_s + _WAKE_MARGIN_S,
            )
            _log.info("the backend %s: its endpoint answered %s to waking", self.name, status)
        except UpstreamError as error:
            _log.warning("the backend %s could not wake its endpoint: %s", self.name, error)
        finally:
            self._status.forget()

    # --- the engine ---------------------------------------------------------------------------

    def _known(self) -> tuple[str | None, str | None]:
        """Address and engine as far as they are known without asking."""
        if self._endpoint is None:
            return self._url, self._guessed
        status = self._status.value
        if status is None:
            return None, None
        return status.url, self._guessed if status.engine in _GUESSED_ENGINES else status.engine

    async def _engine(self, url: str, engine: str, key: Key) -> str:
        """The engine, asked of the endpoint once, in the course of a call, where nobody says."""
        if engine not in _GUESSED_ENGINES:
            return engine
        if self._guessed is None:
            async with self._guessing:
                if self._guessed is None:
                    self._guessed = await self._guess(url, key)
        return self._guessed

    async def _guess(self, url: str, key: Key) -> str:
        status, headers, body = await self._client.fetch(
            "GET", f"{url}/info", headers=self.credential.headers(key.token)
        )
        if status in (401, 403, 408, 429) or 300 <= status < 400 or status >= 500:
            raise refusal(f"{self.name}'s /info", status, headers, body)
        return engine_of(body) if status == 200 else "openai"

    def _inner(self, url: str, engine: str, token: str | None) -> Backend:
        """The backend of the engine's own kind; one for each key that has its own token."""
        place = (url, engine, token)
        inner = self._inners.get(place)
        if inner is None:
            make = _DIALECTS.get(engine, OpenAiBackend)
            credential = OwnToken(token) if token else self.credential
            inner = self._inners[place] = make(self.name, url, self._client, credential=credential)
            while len(self._inners) > _INNERS_MAX:
                self._inners.popitem(last=False)
        self._inners.move_to_end(place)
        return inner


def engine_of(info: bytes) -> str:
    """The engine whose `/info` this is: TGI names its router, TEI its kind of model."""
    try:
        value = orjson.loads(info)
    except orjson.JSONDecodeError:
        return "openai"
    if isinstance(value, dict) and "model_type" in value:
        return "tei"
    return "tgi" if isinstance(value, dict) and "router" in value else "openai"


def _may_be_asleep(error: UpstreamError) -> bool:
    """Whether the proxy, and not the container, may have given this answer."""
    return isinstance(
        error, ConnectFailed | UpstreamFailed | UpstreamBroken
    ) or error.upstream_status in (404, 502, 503)
