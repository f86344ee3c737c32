"""One HTTP request on its way through: its id, its key, its body within the limits, its headers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

from router.api.answer import lines
from router.api.limits import rate_lines
from router.api.request import Request
from router.api.service import Service, Shared
from router.core import jsontext
from router.core.cache_key import read_control
from router.errors import BadRequest, SlowRequest, TooLarge
from router.flow.idempotency import Again, fingerprint
from router.flow.observe import Record
from router.flow.reuse import Wishes
from router.types import Key

_CLIENT_ID_CHARS_MAX = 128
_NO_WISHES = Wishes()
_IDEMPOTENCY_CHARS_MAX = 255
_NOBODY = Key("", ladders=frozenset())


class RequestIds:
    """Ids that are unique, cheap and say nothing: a random part a process, and a number."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(6)
        self._count = 0

    def next(self) -> str:
        self._count += 1
        return f"req_{self._prefix}{self._count:08x}"


class Exchange:
    """A request, with what the handlers know about it as they go.

    `argument` is what stands in the place of the `*` of its route; `key` is the caller's, and
    nobody where the route is for everybody.
    """

    __slots__ = (
        "_arrived",
        "_body",
        "_clock",
        "_cors",
        "argument",
        "body_bytes",
        "id",
        "key",
        "origin",
        "record",
        "request",
        "service",
        "shared",
    )

    def __init__(
        self,
        request: Request,
        route: str,
        request_id: str,
        service: Service,
        shared: Shared,
    ) -> None:
        self.request = request
        self.service = service
        self.shared = shared
        self.id = request_id
        self.argument = ""
        self.key = _NOBODY
        self._body = b""
        self.body_bytes = 0
        self._clock: Callable[[], float] = shared.clock
        self._arrived = self._clock() - request.waited_s
        self.origin = request.header("origin")
        self._cors = lines(service.guard.cors(self.origin)) if self.origin is not None else ""
        self.record = Record(request_id, route)
        client_id = request.header("x-client-request-id")
        if client_id is not None:
            self.record.client_request_id = _printable(client_id[:_CLIENT_ID_CHARS_MAX])

    def recognise(self) -> Key | None:
        """The caller's key, which is `key` from now on; None where the store has to be asked.

        Raises Unauthenticated.
        """
        key = self.service.guard.known(self.request.header("authorization"))
        return None if key is None else self._came_as(key)

    async def authenticate(self) -> Key:
        """As `recognise`, asking the store."""
        return self._came_as(
            await self.service.guard.authenticate(self.request.header("authorization"))
        )

    def _came_as(self, key: Key) -> Key:
        self.key = key
        self.record.key = key.name
        return key

    def wishes(self) -> Wishes:
        """What the headers ask for beside the body, which is let go."""
        body, self._body = self._body, b""
        header = self.request.header
        control, name = header("cache-control"), header("idempotency-key")
        if control is None and name is None:
            return _NO_WISHES
        again = None
        if name is not None:
            # Bytes that are no UTF-8 come as lone surrogates, which no store can write.
            if not 0 < len(name) <= _IDEMPOTENCY_CHARS_MAX or not name.isprintable():
                raise BadRequest(
                    f"Idempotency-Key must have 1 to {_IDEMPOTENCY_CHARS_MAX} printable characters",
                    code="invalid_idempotency_key",
                )
            again = Again(name, fingerprint(self.record.route, body))
        return Wishes(read_control(control), again)

    def elapsed_s(self) -> float:
        return self._clock() - self._arrived

    def lines(self) -> str:
        """The head's lines that every answer to this request has."""
        record = self.record
        found = (
            f"x-request-id: {self.id}\r\n"
            f"openai-processing-ms: {int(self.elapsed_s() * 1000)}\r\n"
            f"x-rungway-cache: {record.cache}\r\n{self._cors}"
        )
        if record.inputs:
            found += f"x-rungway-cached-inputs: {record.cached_inputs}/{record.inputs}\r\n"
        limits = self.key.limits
        if limits.requests_per_minute is not None or limits.tokens_per_minute is not None:
            ledger = self.shared.ledger
            found += rate_lines(ledger.purse(self.key), ledger.now_s())
        return found

    async def read_json(self, *, may_be_empty: bool = False) -> Any:
        """The body as JSON, within the limits of size and time; {} of an empty one that may be so.

        Raises CallerError.
        """
        body = await self._read_body()
        self._body, self.body_bytes = body, len(body)
        if may_be_empty and not body:
            return {}
        try:
            return jsontext.read(body)
        except ValueError as error:
            raise BadRequest(
                f"the request body is not JSON: {error}", code="invalid_json"
            ) from error

    async def _read_body(self) -> bytes:
        limits, request = self.service.limits, self.request
        if (request.body_bytes or 0) > limits.body_bytes_max:
            raise self._too_large()
        body = request.take_body()
        if body is not None:
            return body
        parts, size = [], 0
        try:
            async with asyncio.timeout(limits.body_s - request.waited_s):
                while part := await request.read():
                    size += len(part)
                    if size > limits.body_bytes_max:
                        raise self._too_large()
                    parts.append(part)
        except TimeoutError as error:
            raise SlowRequest(
                f"the request body did not arrive within {limits.body_s:g} s"
            ) from error
        return b"".join(parts)

    def _too_large(self) -> TooLarge:
        mib = self.service.limits.body_bytes_max / (1 << 20)
        return TooLarge(f"the request body is larger than {mib:g} MiB (server.max_body_mib)")


def _printable(text: str) -> str:
    # The servers let any byte through, and the log and the metrics are for people.
    return "".join(c if " " <= c <= "~" else "?" for c in text)
