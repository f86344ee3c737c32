"""Which handler answers which path, and who may ask.

Paths stand here without `/v1` and without a trailing slash, since clients and their users leave out
either. A `*` is whatever stands in its place, slashes too; a path without one goes before.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple
from urllib.parse import unquote

from router.api.exchange import Exchange
from router.api.reply import Reply

# The answer, or None where the handler has written it.
Handler = Callable[[Exchange], Awaitable[Reply | None]]


class Caller(enum.Enum):
    """Who may ask: anybody, whoever has a key, a key with `admin`, or as the configuration says."""

    ANYBODY = enum.auto()
    KEY = enum.auto()
    ADMIN = enum.auto()
    OPERATOR = enum.auto()


class Route(NamedTuple):
    """`is_hot`: so many requests come here that each step is felt (`api/head.py`)."""

    handler: Handler
    caller: Caller = Caller.KEY
    is_hot: bool = False


Methods = Mapping[str, Route]


class Routes:
    """The table of all routes."""

    def __init__(self, table: Mapping[str, Methods]) -> None:
        self._exact = {path: methods for path, methods in table.items() if "*" not in path}
        # The longest first, so that `/keys/*/rotate` goes before `/keys/*`.
        self._open: list[tuple[str, str, Methods]] = []
        for path in sorted(table, key=len, reverse=True):
            head, star, tail = path.partition("*")
            if star:
                self._open.append((head, tail, table[path]))

    def hot(self) -> list[tuple[str, str]]:
        """The method and the path of each hot route, in all ways to write it."""
        return [
            (method, prefix + path + slash)
            for path, methods in self._exact.items()
            for method, route in methods.items()
            if route.is_hot
            for prefix in ("", "/v1")
            for slash in ("", "/")
        ]

    def find(self, path: str) -> tuple[Methods, str] | None:
        """The methods of a path, and what stands in the place of its `*`, decoded."""
        exact = self._exact.get(path)
        if exact is not None:
            return exact, ""
        for head, tail, methods in self._open:
            end = len(path) - len(tail)
            if path.startswith(head) and path.endswith(tail) and end > len(head):
                return methods, unquote(path[len(head) : end])
        return None
