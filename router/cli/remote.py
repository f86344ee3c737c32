"""Calls to the running daemon, for the commands that ask it something."""

from __future__ import annotations

import os
from typing import Any

import httpx

from router.types import Json

_DEFAULT_URL = "http://127.0.0.1:8484"
_LIMIT_S = 30.0


class DaemonUnreachable(Exception):
    """Nobody answers at the daemon's address."""


class DaemonRefused(Exception):
    """The daemon answered with an error; the text is its message."""


def ask(method: str, path: str, url: str | None, body: Json | None = None) -> Any:
    """The daemon's answer to one request. Raises DaemonUnreachable or DaemonRefused."""
    base = (url or os.environ.get("RUNGWAY_URL") or _DEFAULT_URL).rstrip("/").removesuffix("/v1")
    key = os.environ.get("RUNGWAY_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.request(
            method, base + path, json=body, headers=headers, timeout=_LIMIT_S, trust_env=False
        )
    except httpx.HTTPError as error:
        raise DaemonUnreachable(f"no daemon answers at {base}: {error}") from error
    try:
        value = answer.json()
    except ValueError as error:
        raise DaemonRefused(f"{base} answered {answer.status_code} without JSON") from error
    if answer.status_code >= 400:
        inner = value.get("error") if isinstance(value, dict) else None
        words = inner.get("message") if isinstance(inner, dict) else answer.text[:500]
        hint = "; give a key in $RUNGWAY_API_KEY" if answer.status_code == 401 else ""
        raise DaemonRefused(f"{base} answered {answer.status_code}: {words}{hint}")
    return value
