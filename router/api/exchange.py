"""One HTTP request on its way through: its id, its key, its body within the limits, its headers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

from aiohttp import web

from router.api.limits import rate_headers
from router.api.reply import SERVER_NAME
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

    def __init__(
        self,
        request: web.BaseRequest,
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
        self._arrived = self._clock()
        self._cors = service.guard.cors(request.headers.get("Origin"))
        self.record = Record(request_id, route)
        client_id = request.headers.get("X-Client-Request-Id", "")[:_CLIENT_ID_CHARS_MAX]
        # aiohttp lets any byte through, and the log and the metrics are for people.
        self.record.client_request_id = "".join(c if " " <= c <= "~" else "?" for c in client_id)

    async def authenticate(self) -> Key:
        """The caller's key, which is `key` from now on. Raises Unauthenticated."""
        guard = self.service.guard
        self.key = await guard.authenticate(self.request.headers.get("Authorization"))
        self.record.key = self.key.name
        return self.key

    def wishes(self) -> Wishes:
        """What the headers ask for beside the body."""
        headers = self.request.headers
        control, name = headers.get("Cache-Control"), headers.get("Idempotency-Key")
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
            again = Again(name, fingerprint(self.record.route, self._body))
        return Wishes(read_control(control), again)

    def elapsed_s(self) -> float:
        return self._clock() - self._arrived

    def headers(self) -> dict[str, str]:
        """The headers of every answer to this request."""
        headers = {
            "x-request-id": self.id,
            "openai-processing-ms": str(int(self.elapsed_s() * 1000)),
            "x-rungway-cache": self.record.cache,
            "Server": SERVER_NAME,
            **self._cors,
        }
        record = self.record
        if record.inputs:
            headers["x-rungway-cached-inputs"] = f"{record.cached_inputs}/{record.inputs}"
        limits = self.key.limits
        if limits.requests_per_minute is not None or limits.tokens_per_minute is not None:
            ledger = self.shared.ledger
            headers.update(rate_headers(ledger.purse(self.key), ledger.now_s()))
        return headers

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
        limits = self.service.limits
        content = self.request.content
        length = self.request.content_length
        if length is not None and length > limits.body_bytes_max:
            raise self._too_large()
        if content.is_eof() and length:
            # The usual case: the whole body came with the head.
            body: bytes = content.read_nowait()
            if content.at_eof():
                return body
        else:
            body = b""
        parts, size = [body], len(body)
        if self.request.headers.get("Expect", "").lower() == "100-continue":
            # aiohttp answers this only in its Application; without it curl waits a second.
            await self.request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(limits.body_s):
                while chunk := await content.readany():
                    size += len(chunk)
                    if size > limits.body_bytes_max:
                        raise self._too_large()
                    parts.append(chunk)
        except TimeoutError as error:
            raise SlowRequest(
                f"the request body did not arrive within {limits.body_s:g} s"
            ) from error
        except web.RequestPayloadError as error:
            raise BadRequest(f"the request body cannot be read: {error}") from error
        return b"".join(parts)

    def _too_large(self) -> TooLarge:
        mib = self.service.limits.body_bytes_max / (1 << 20)
        return TooLarge(f"the request body is larger than {mib:g} MiB (server.max_body_mib)")
