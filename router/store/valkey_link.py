"""The connection to a Valkey or Redis server: scripts run there within a limit of time, or fail.

What the server cannot do at opening is `StateRefused`, later `StateUnavailable`; `StateLost` where
its books are not the ones that were opened. The `valkey` package is an extra, so
`open.py` imports this late.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import orjson
import valkey.exceptions as faults
from valkey.asyncio import BlockingConnectionPool, Valkey

from router.errors import StateUnavailable
from router.store.base import StateLost, StateRefused

# One slot of a cluster holds all of it, since scripts are atomic only within one.
PREFIX = "{rungway}:"
_EPOCH = f"{PREFIX}epoch"
_CONNECT_S = 2.0
_CALL_S = 2.0
_PENDING_MAX = 256
_CONNECTIONS_MAX = 16
# The first with all that the scripts use; Valkey tells the Redis version that it is compatible to.
_VERSION_MIN = (6, 2)
# All others throw keys away where memory is short; the volatile ones too: accounts have an end.
_KEEPING = "noeviction"

_NO_MEMORY = "it has no memory left (maxmemory); give it more"
_IS_REPLICA = "it is a replica; name the primary in [state] url"
# The client takes the first word of some errors away and makes a kind of them.
_KINDS: dict[type[Exception], str] = {
    faults.OutOfMemoryError: _NO_MEMORY,
    faults.ReadOnlyError: _IS_REPLICA,
    faults.BusyLoadingError: "it is still loading its data",
    faults.NoPermissionError: "its user may not do what the state needs: ~{rungway}:* +@all",
    faults.AuthenticationError: "it asks for a password, or refuses the user or the one given",
    faults.TimeoutError: f"it did not answer in {_CALL_S:g} s",
    TimeoutError: f"it did not answer in {_CALL_S:g} s",
}
_WORDS = {
    # As Redis before 7 writes them, somewhere within the error of a script.
    "OOM": _NO_MEMORY,
    "READONLY": _IS_REPLICA,
    "MISCONF": "it cannot write its snapshot; see its log",
    "BUSY": "a script of somebody else keeps it busy",
    "MOVED": "it is a cluster, and another node has the slot of {rungway}; name that one",
}
_log = logging.getLogger(__name__)


class ValkeyLink:
    """`now` gives unix seconds; None: the server's own clock, on which all hosts agree."""

    def __init__(
        self,
        url: str,
        *,
        username: str | None = None,
        password: str | None = None,
        now: Callable[[], float] | None = None,
    ) -> None:
        self.place = _without_secrets(url)
        self._now = now
        self._expected = ""
        self._pending = 0
        self._client = self._make_client(url, username, password)

    async def open(self) -> None:
        """Raises StateRefused."""
        try:
            async with asyncio.timeout(_CONNECT_S + _CALL_S):
                about = await self._client.info("server")
                self._check_version(about)
                await self._check_policy()
                found = await self._make_books()
        except (faults.ValkeyError, OSError, TimeoutError) as error:
            await self.aclose()
            raise StateRefused(
                f"the state in {self.place} cannot be used: {_in_words(error)}; see [state] url"
            ) from error
        except BaseException:
            await self.aclose()
            raise
        self._expected = self._expected or found

    async def aclose(self) -> None:
        await self._client.aclose(close_connection_pool=True)

    def expect_epoch(self, epoch: str) -> None:
        self._expected = epoch

    async def epoch(self, *, adopt: bool) -> str:
        found: str = await self._call(self._make_books)
        if adopt:
            self._expected = found
        return found

    async def run(self, script: str, arguments: dict[str, Any], *raw: bytes) -> Any:
        """Run it on the books that are expected; `raw` are its further arguments."""
        if self._now is not None:
            arguments = {**arguments, "now": self._now()}
        given: list[Any] = [_EPOCH, self._expected, orjson.dumps(arguments), *raw]

        async def call() -> Any:
            try:
                return await self._client.evalsha(_digest(script), 1, *given)  # type: ignore[misc]
            except faults.NoScriptError:
                return await self._client.eval(script, 1, *given)  # type: ignore[misc]

        return await self._call(call)

    async def read_all(self, commands: list[tuple[str, ...]]) -> list[Any]:
        """Many commands in one exchange; the books are not looked at."""

        async def call() -> list[Any]:
            pipeline = self._client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            return list(await pipeline.execute())

        return list(await self._call(call))

    async def _call(self, call: Callable[[], Any]) -> Any:
        if self._pending >= _PENDING_MAX:
            raise StateUnavailable(
                f"the state in {self.place} is too slow: {self._pending} others wait for it"
            )
        self._pending += 1
        try:
            async with asyncio.timeout(_CALL_S):
                try:
                    return await call()
                except faults.ConnectionError:
                    # A connection that was kept may be of a server that is gone since; each method
                    # can be said again.
                    return await call()
        except (faults.ValkeyError, OSError, TimeoutError) as error:
            word, _, found = str(error).partition(" ")
            if word == "STATELOST":
                raise StateLost(
                    f"the state in {self.place} lost its data or was replaced (books "
                    f"{found or 'none'}, expected {self._expected}): budgets would start anew"
                ) from error
            raise StateUnavailable(f"the state in {self.place}: {_in_words(error)}") from error
        finally:
            self._pending -= 1

    def _make_client(self, url: str, username: str | None, password: str | None) -> Valkey:
        given = {
            name: value
            for name, value in (("username", username), ("password", password))
            if value is not None
        }
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=_CONNECTIONS_MAX,
                timeout=_CALL_S,
                socket_connect_timeout=_CONNECT_S,
                socket_timeout=_CALL_S,
                socket_keepalive=True,
                **given,
            )
        except ValueError as error:
            raise StateRefused(f"the state's address {self.place} is wrong: {error}") from error
        return Valkey(connection_pool=pool)

    async def _make_books(self) -> str:
        """The id of the books that are there; where there are none, empty ones are made."""
        await self._client.set(_EPOCH, secrets.token_hex(8), nx=True)
        found: bytes = await self._client.get(_EPOCH)
        return found.decode()

    def _check_version(self, about: dict[str, Any]) -> None:
        found = str(about.get("redis_version", "0"))
        parts = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
        if parts < _VERSION_MIN:
            raise StateRefused(
                f"the server at {self.place} is too old ({found}): the state takes Valkey, or "
                f"Redis from {'.'.join(map(str, _VERSION_MIN))} on"
            )

    async def _check_policy(self) -> None:
        try:
            found = await self._client.config_get("maxmemory-policy")
        except faults.ResponseError:
            _log.warning(
                "the server at %s does not tell its maxmemory-policy: it must be %s, "
                "or budgets may vanish",
                self.place,
                _KEEPING,
            )
            return
        policy = found.get("maxmemory-policy", _KEEPING)
        if policy != _KEEPING:
            raise StateRefused(
                f"the server at {self.place} may throw budgets away: its maxmemory-policy is "
                f"{policy}; set it to {_KEEPING}, or use a server of its own"
            )


def _digest(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _in_words(error: BaseException) -> str:
    for kind, words in _KINDS.items():
        if isinstance(error, kind):
            return words
    text = str(error)
    known = [_WORDS[word] for part in text.split() if (word := part.lstrip("-")) in _WORDS]
    return known[0] if known else text or type(error).__name__
