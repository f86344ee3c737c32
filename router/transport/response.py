"""An answer as its caller sees it: status and headers are here, the body is read in pieces.

Its connection fills it (`begin`, `take`, `end`, `fail`), its caller empties it; neither waits for
the other but through `wait`. What was received before a failure is read before the failure is told.
Once the body has ended the connection serves others, and what is unread is kept here.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

from router.errors import UpstreamBroken, UpstreamError
from router.transport import failures
from router.transport.wire import Headers, media_type

# Beyond this much that nobody has read, an upstream is not read from.
HELD_BYTES_MAX = 64 << 10
_UNPACKED_BYTES_MAX = 256 << 10
_NO_HEADERS: Mapping[bytes, bytes] = {}


class Line(Protocol):
    """What an answer asks of its connection."""

    def resume(self) -> None: ...

    def abort(self) -> None: ...

    def linger(self) -> None: ...


class HttpResponse:
    """An open answer.

    `close` may be called at any time and any number of times; before the body's end it closes the
    connection, which is how an upstream learns that nobody listens any more.
    """

    __slots__ = (
        "_error",
        "_held_bytes",
        "_is_ended",
        "_line",
        "_loop",
        "_offer",
        "_parts",
        "_raw",
        "_unpacker",
        "_waiter",
        "method",
        "status",
        "url",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, line: Line, method: str, url: str) -> None:
        self._loop = loop
        self._line: Line | None = line
        self.method = method
        self.url = url
        self.status = 0
        self._raw = _NO_HEADERS
        self._parts: list[bytes] = []
        self._held_bytes = 0
        self._is_ended = False
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._offer: Callable[[bytes], bool] | None = None
        self._unpacker: _Unpacker | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        return Headers(self._raw)

    @property
    def content_type(self) -> str:
        """The media type without parameters, lower case; "" where there is none."""
        return media_type(self._raw.get(b"content-type", b""))

    @property
    def where(self) -> str:
        """What is being done, for the words of a failure."""
        return failures.READING if self.status else f"on {self.method} {failures.safe(self.url)}"

    # --- the caller's side ----------------------------------------------------------------------

    async def arrive(self) -> None:
        """Wait for the head. Raises UpstreamError."""
        while not self.status:
            if self._error is not None:
                raise self._error
            await self.more()

    async def read_chunk(self) -> bytes:
        """All that has arrived; b"" at the body's clean end. Raises UpstreamError.

        Never more than `HELD_BYTES_MAX` and one read of the socket.
        """
        while (data := self.read_now()) is None:
            await self.more()
        return data

    def read_now(self) -> bytes | None:
        """As `read_chunk`; None where nothing has arrived yet."""
        if data := self._taken():
            return data
        if self._error is not None:
            raise self._error.with_traceback(None)
        if not self._is_ended:
            return None
        if self._unpacker is not None:
            self._unpacker.finish()
        return b""

    def more(self, offer: Callable[[bytes], bool] | None = None) -> asyncio.Future[None]:
        """Done when something has changed. For one at a time, who awaits it on the spot.

        What arrives until then is given to `offer`, without waking anybody; where it returns True,
        that is all that becomes of it.
        """
        self._offer, self._waiter = offer, self._loop.create_future()
        return self._waiter

    def forget_headers(self) -> None:
        """Nobody asks for them any more, and a stream may last."""
        self._raw = _NO_HEADERS

    def whole(self, bytes_max: int) -> bytes | None:
        """The whole body where it came with the head, as it mostly does; else None."""
        if self._is_ended and self._unpacker is None and self._held_bytes <= bytes_max:
            return self._taken()
        return None

    async def read_all(self, bytes_max: int) -> bytes:
        """The whole body. Raises UpstreamBroken when it is larger than `bytes_max`."""
        parts: list[bytes] = []
        size = 0
        while chunk := await self.read_chunk():
            size += len(chunk)
            if size > bytes_max:
                self.close()
                raise UpstreamBroken(f"the answer is larger than {bytes_max} bytes")
            parts.append(chunk)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.abort()

    def close_when_ended(self) -> None:
        """Close, but give a body whose content is all here a moment to end: its last chunk often
        comes after it, and only then can the connection serve another request.
        """
        line, self._line = self._line, None
        if line is not None:
            self._error = failures.closed()
            line.linger()

    async def __aenter__(self) -> HttpResponse:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- the connection's side ------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        return self._held_bytes > HELD_BYTES_MAX

    def begin(self, status: int, raw: Mapping[bytes, bytes]) -> None:
        """The head is here; `raw` has lower-case names."""
        self.status = status
        self._raw = raw
        packed = raw.get(b"content-encoding")
        if packed is not None and packed.strip().lower() not in (b"", b"identity"):
            self._unpacker = _Unpacker(packed.strip().lower())

    def take(self, data: bytes) -> None:
        """More of the body."""
        self._parts.append(data)
        self._held_bytes += len(data)

    def arrived(self) -> None:
        """What was taken is all of one read."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        parts = self._parts
        if self._offer is not None and parts and self._unpacker is None:
            if len(parts) > 1:
                parts[:] = [b"".join(parts)]
            if self._offer(parts[0]):
                parts.clear()
                self._held_bytes = 0
                return
        self.wake()

    def end(self) -> None:
        """The body has ended cleanly."""
        self._is_ended = True
        self._line = None
        self.wake()

    def fail(self, error: UpstreamError) -> None:
        self._error = error
        self._line = None
        self.wake()

    def wake(self) -> None:
        waiter, self._waiter, self._offer = self._waiter, None, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _taken(self) -> bytes:
        if self._unpacker is not None and (some := self._unpacker.more()):
            return some
        parts = self._parts
        if not parts:
            return b""
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if self.is_full and self._line is not None:
            self._line.resume()
        self._held_bytes = 0
        return data if self._unpacker is None else self._unpacker.feed(data)


class _Unpacker:
    """A body that comes compressed though `identity` was asked for. Raises UpstreamBroken.

    Never more at a time than `_UNPACKED_BYTES_MAX`: a few bytes may stand for very many.
    """

    def __init__(self, coding: bytes) -> None:
        self._coding = coding
        self._packing = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
        self._has_more = False
        self._has_begun = False

    def feed(self, data: bytes) -> bytes:
        if self._coding not in (b"gzip", b"x-gzip", b"deflate"):
            shown = self._coding[:32].decode("ascii", "replace")
            raise UpstreamBroken(f"the upstream compresses its answer ({shown}) though told not to")
        try:
            found = self._packing.decompress(data, _UNPACKED_BYTES_MAX)
        except zlib.error as error:
            raise UpstreamBroken(f"the upstream's compressed answer is broken ({error})") from error
        if self._packing.unused_data:
            raise UpstreamBroken("the upstream's compressed answer goes on after its end")
        self._has_begun = True
        self._has_more = len(found) == _UNPACKED_BYTES_MAX
        return found

    def more(self) -> bytes:
        """What the packed bytes that were fed still hold."""
        return self.feed(self._packing.unconsumed_tail) if self._has_more else b""

    def finish(self) -> None:
        # No body at all, as behind 204, is whole.
        if self._has_begun and not self._packing.eof:
            raise failures.gone(None, failures.READING)
