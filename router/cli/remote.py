"""Calls to the running daemon, for the commands that ask it something."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import httpx

from router.cli.main import FAILED, WRONG_USE
from router.config.addresses import address_to_ask
from router.config.load import find, load_server
from router.config.schema import Server
from router.errors import ConfigError
from router.types import Json

_LIMIT_S = 30.0


class DaemonUnreachable(Exception):
    """Nobody answers at the daemon's address."""


class DaemonRefused(Exception):
    """The daemon answered with an error; the text is its message, `code` its code.

    `words` are the message alone, without who said it. `is_ours`: the request was wrong.
    """

    def __init__(
        self, text: str, *, words: str = "", code: str = "", is_ours: bool = False
    ) -> None:
        super().__init__(text)
        self.words = words
        self.code = code
        self.is_ours = is_ours


def ask(
    method: str, path: str, url: str | None, config: str | None, body: Json | None = None
) -> Any:
    """The daemon's answer to one request; `url` and `config` are as on the command line.

    Raises DaemonUnreachable, DaemonRefused or ConfigError.
    """
    base = (url or os.environ.get("RUNGWAY_URL") or _configured_url(config)).rstrip("/")
    base = base.removesuffix("/v1")
    key = os.environ.get("RUNGWAY_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.request(
            method, base + path, json=body, headers=headers, timeout=_LIMIT_S, trust_env=False
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DaemonUnreachable(f"no daemon answers at {base}: {error}") from error
    try:
        value = answer.json()
    except ValueError as error:
        raise DaemonRefused(f"{base} answered {answer.status_code} without JSON") from error
    if answer.status_code >= 400:
        inner = value.get("error") if isinstance(value, dict) else None
        inner = inner if isinstance(inner, dict) else {}
        words = str(inner.get("message") or answer.text[:500])
        hint = "; give a key in $RUNGWAY_API_KEY" if answer.status_code == 401 else ""
        text = f"{base} answered {answer.status_code}: {words}{hint}"
        is_ours = answer.status_code == 400
        raise DaemonRefused(text, words=words, code=str(inner.get("code")), is_ours=is_ours)
    return value


def told(error: DaemonRefused | DaemonUnreachable) -> int:
    """Say what went wrong; the exit code."""
    print(f"rungway: {error}", file=sys.stderr)
    return WRONG_USE if isinstance(error, DaemonRefused) and error.is_ours else FAILED


def _configured_url(config: str | None) -> str:
    """Where the daemon of this configuration listens; without any, where it does by default."""
    path = find(config, os.environ, Path.cwd())
    try:
        server = Server() if path is None else load_server(path)
    except ConfigError as error:
        if config or os.environ.get("RUNGWAY_CONFIG"):
            raise
        # A file that only lies here, or that this user may not read, is no reason to give up.
        server = Server()
        print(f"{error}; asking the default address", file=sys.stderr)
    if server.port == 0:
        raise DaemonUnreachable(f"{path} lets the daemon take any free port; give its --url")
    return f"http://{address_to_ask(server.host)}:{server.port}"
