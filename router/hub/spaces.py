"""Spaces on the Hub: where one is served, in which stage it is, and how to wake it.

The stage is an open set of strings (SLEEPING is in none of the published lists), so an unknown one
is a standing of its own. Only `wake` touches the Space itself: any request to its host wakes it and
starts its idle time anew, which a look from outside must not do.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from router.core.refusal import refusal
from router.errors import RungRefused, UpstreamBroken, UpstreamError
from router.transport.http import HttpClient

HUB_URL = "https://huggingface.co"
_CONTROL_S = 10.0
_WAKE_S = 30.0
_ANSWER_BYTES_MAX = 1 << 20
_MISSING_COOL_S = 60.0
_WORDS_CHARS_MAX = 200
_HOST = re.compile(r"https?://[a-z0-9.-]{1,253}(?::\d{1,5})?", re.IGNORECASE)


class Standing(enum.Enum):
    """What a stage means for a caller."""

    CALLABLE = "callable"
    STARTING = "starting"
    ASLEEP = "asleep"  # a request wakes it
    PAUSED = "paused"  # only its owner can wake it
    DEAD = "dead"
    UNKNOWN = "unknown"


_STANDINGS = {
    "RUNNING": Standing.CALLABLE,
    "RUNNING_BUILDING": Standing.CALLABLE,
    "RUNNING_APP_STARTING": Standing.CALLABLE,
    "APP_STARTING": Standing.STARTING,
    "BUILDING": Standing.STARTING,
    "SLEEPING": Standing.ASLEEP,
    "STOPPED": Standing.ASLEEP,
    "PAUSED": Standing.PAUSED,
    "NO_APP_FILE": Standing.DEAD,
    "CONFIG_ERROR": Standing.DEAD,
    "BUILD_ERROR": Standing.DEAD,
    "RUNTIME_ERROR": Standing.DEAD,
    "DELETING": Standing.DEAD,
}


@dataclass(frozen=True, slots=True)
class Runtime:
    """A Space's stage as the Hub tells it, with the reason where it tells one."""

    stage: str
    reason: str = ""

    @property
    def standing(self) -> Standing:
        return _STANDINGS.get(self.stage, Standing.UNKNOWN)

    @property
    def words(self) -> str:
        return f"{self.stage}: {self.reason}" if self.reason else self.stage


class Spaces:
    """The Hub's answers about Spaces. `headers` of each question hold the token, where one is."""

    def __init__(self, client: HttpClient, hub: str = HUB_URL) -> None:
        self._client = client
        self._hub = hub.rstrip("/")

    async def host(self, space: str, headers: Mapping[str, str]) -> str:
        """The address that the Space is served at. Raises UpstreamError."""
        try:
            told = await self._ask(f"/api/spaces/{space}/host", space, headers)
        except RungRefused:
            told = await self._ask(f"/api/spaces/{space}", space, headers)
        host = told.get("host")
        if not isinstance(host, str) or not _HOST.fullmatch(host.rstrip("/")):
            raise UpstreamBroken(f"the Hub names no usable host for the Space {space}")
        if self._hub.startswith("https:") and not host.startswith("https:"):
            raise UpstreamBroken(f"the Hub names a host without https for the Space {space}")
        return host.rstrip("/")

    async def runtime(self, space: str, headers: Mapping[str, str]) -> Runtime:
        """The Space's stage. Raises UpstreamError."""
        told = await self._ask(f"/api/spaces/{space}/runtime", space, headers)
        stage, reason = told.get("stage"), told.get("errorMessage")
        if not isinstance(stage, str):
            raise UpstreamBroken(f"the Hub tells no stage of the Space {space}")
        words = " ".join(reason.split())[:_WORDS_CHARS_MAX] if isinstance(reason, str) else ""
        return Runtime(stage[:40], words)

    async def wake(self, host: str, headers: Mapping[str, str]) -> None:
        """Send the request that wakes the Space at `host`; what it answers does not matter."""
        try:
            await self._client.fetch("GET", f"{host}/", headers=headers, within_s=_WAKE_S)
        except UpstreamError:
            return

    async def _ask(self, path: str, space: str, headers: Mapping[str, str]) -> dict[str, Any]:
        status, answer_headers, body = await self._client.fetch(
            "GET",
            f"{self._hub}{path}",
            headers={"Accept": "application/json", **headers},
            bytes_max=_ANSWER_BYTES_MAX,
            within_s=_CONTROL_S,
        )
        if status in (401, 404):
            raise RungRefused(
                f"the Hub knows no Space {space}, or not for this token (it answered {status})",
                code="upstream_model",
                cool_s=_MISSING_COOL_S,
            )
        if not 200 <= status < 300:
            raise refusal("the Hub", status, answer_headers, body)
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise UpstreamBroken(f"the Hub answered {path} with no JSON") from error
        if not isinstance(value, dict):
            raise UpstreamBroken(f"the Hub answered {path} with no object")
        return value
