"""The management API of Inference Endpoints: how an endpoint is, and starting a paused one.

Asking here neither wakes an endpoint nor keeps it awake; a request to the endpoint itself does
both, and is billed. Facts: the endpoints' client in huggingface_hub, and their documentation.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import orjson

from router.core.refusal import complaint_of, refusal
from router.errors import RungRefused, UpstreamBroken, UpstreamError
from router.transport.http import HttpClient
from router.types import Json

MANAGEMENT_URL = "https://api.endpoints.huggingface.cloud"
_STATUS_BYTES_MAX = 1 << 20
_FETCH_S = 5.0
_MESSAGE_CHARS_MAX = 300


class EndpointState(enum.StrEnum):
    """The states that are documented; the API may add others."""

    PENDING = "pending"
    INITIALIZING = "initializing"
    UPDATING = "updating"
    UPDATE_FAILED = "updateFailed"
    RUNNING = "running"
    PAUSED = "paused"
    FAILED = "failed"
    SCALED_TO_ZERO = "scaledToZero"


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """One endpoint now. `state` is open: see EndpointState. `url` None: never deployed so far.

    `engine` is the key of `model.image`, which names the container's dialect ("" unknown).
    """

    state: str
    url: str | None = None
    engine: str = ""
    message: str = ""
    ready_replicas: int = 0
    health_route: str = "/health"


class EndpointsApi:
    """`url` is the API's base, with or without `/v2`."""

    def __init__(self, client: HttpClient, url: str | None = None) -> None:
        self._client = client
        self._base = (url or MANAGEMENT_URL).rstrip("/").removesuffix("/v2")

    async def state(self, namespace: str, name: str, headers: Mapping[str, str]) -> EndpointStatus:
        """How the endpoint is. Raises UpstreamError."""
        who = f"the management API of {namespace}/{name}"
        status, answered, body = await self._ask("GET", self._path(namespace, name), headers)
        if status != 200:
            raise _management_error(refusal(who, status, answered, body))
        try:
            return self._read(orjson.loads(body))
        except (ValueError, TypeError, KeyError) as error:
            raise UpstreamBroken(f"{who} gave an answer that cannot be read: {error}") from error

    async def resume(self, namespace: str, name: str, headers: Mapping[str, str]) -> None:
        """Start a paused endpoint, which costs from then on. Running already is as good."""
        who = f"the management API of {namespace}/{name}"
        url = f"{self._path(namespace, name)}/resume"
        status, answered, body = await self._ask("POST", url, headers)
        if 200 <= status < 300:
            return
        if status == 400 and "already running" in complaint_of(body).message.lower():
            return
        raise _management_error(refusal(who, status, answered, body))

    def _path(self, namespace: str, name: str) -> str:
        return f"{self._base}/v2/endpoint/{quote(namespace, safe='')}/{quote(name, safe='')}"

    async def _ask(
        self, method: str, url: str, headers: Mapping[str, str]
    ) -> tuple[int, Mapping[str, str], bytes]:
        return await self._client.fetch(
            method,
            url,
            headers={"Accept": "application/json", **headers},
            bytes_max=_STATUS_BYTES_MAX,
            within_s=_FETCH_S,
        )

    def _read(self, value: Any) -> EndpointStatus:
        """Every field but the state may be missing."""
        status = value["status"]
        state = _text(status["state"])
        replicas = status.get("readyReplica")
        route = value.get("healthRoute")
        return EndpointStatus(
            state=state,
            url=self._usable(status.get("url")),
            engine=_engine(value.get("model")),
            message=_text(status.get("message") or "")[:_MESSAGE_CHARS_MAX],
            ready_replicas=replicas if type(replicas) is int else 0,
            health_route=route if isinstance(route, str) and route.startswith("/") else "/health",
        )

    def _usable(self, url: Any) -> str | None:
        """The address, where a token may go to it: no less guarded than the API itself."""
        if not isinstance(url, str) or not url:
            return None
        scheme = urlsplit(url).scheme
        if scheme != "https" and scheme != urlsplit(self._base).scheme:
            raise ValueError("the endpoint's address is not https")
        return url.rstrip("/")


def _engine(model: Any) -> str:
    image: Json = model["image"] if isinstance(model, dict) and model.get("image") else {}
    return next(iter(image)) if isinstance(image, dict) and image else ""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is missing")
    return value


def _management_error(error: UpstreamError) -> UpstreamError:
    """What the API refuses is the configuration's fault and never the caller's mistake."""
    return error if error.moves_on else RungRefused(error.message, cool_s=60.0)
