"""One HTTP/1.1 connection to an upstream: a request out, its answer in, and then the next one's.

Bytes that nobody asked for end it: what came after an answer's end, or while it was idle, would be
taken for the next caller's answer. Framing is llhttp's (strict) and `wire.framing_fault`'s; what
they refuse ends the connection, since nobody can know where the answer ends.

It is kept only if the request went out whole, the answer ended where its framing says, and neither
side wants to close. httptools knows that only inside `on_message_complete`.
"""

from __future__ import annotations

import asyncio
import select
import socket
import sys
from collections.abc import Callable
from typing import cast

from httptools import (
    HttpParserCallbackError,
    HttpParserError,
    HttpParserUpgrade,
    HttpResponseParser,
)

from router.transport import failures
from router.transport.response import HttpResponse
from router.transport.wire import collected, framing_fault

# A head, or whatever else brings no body: extensions of chunks, trailers.
BARREN_BYTES_MAX = 64 << 10
HEADERS_MAX = 256
INFORMATIONAL_MAX = 8
# Up to here a request is one write; beyond, it goes out as the upstream takes it.
_PIECE_BYTES = 128 << 10
_LINGER_S = 0.25
# `struct tcp_info` of Linux: the state comes first, tcpi_bytes_acked (from 4.2 on) at this place.
_TCP_INFO_BYTES = 128
_BYTES_ACKED = slice(120, 128)


class Connection(asyncio.Protocol):
    """`keep` takes it back when it may serve again, `heard` is told of the end of its first answer
    (None: nobody asks), `forget` when it is gone. `sock` is what it was made on.
    """

    __slots__ = (
        "_acked_before",
        "_barren_bytes",
        "_fault",
        "_forget",
        "_has_head",
        "_heard",
        "_informational",
        "_is_complete",
        "_is_informational",
        "_is_lingering",
        "_is_paused",
        "_is_tls",
        "_is_until_close",
        "_is_write_paused",
        "_keep",
        "_loop",
        "_may_keep",
        "_pairs",
        "_parser",
        "_poll",
        "_request_bytes",
        "_response",
        "_timer",
        "_transport",
        "idle_since",
        "is_open",
        "is_sent",
        "is_used",
        "sock",
    )
    sock: socket.socket

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        keep: Callable[[Connection], None],
        forget: Callable[[Connection], None],
        heard: Callable[[Connection], None] | None = None,
    ) -> None:
        self._loop = loop
        self._keep = keep
        self._heard = heard
        self._forget = forget
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self._poll = select.poll()
        self._response: HttpResponse | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._acked_before = self._request_bytes = 0
        self._is_lingering = self._is_paused = self._is_write_paused = self._is_tls = False
        self.is_open = self.is_used = False
        self.idle_since = 0.0
        self._start_over()

    def _start_over(self) -> None:
        self._pairs: list[tuple[bytes, bytes]] = []
        self._barren_bytes = self._informational = 0
        self._fault = ""
        self._has_head = self._is_informational = self._is_complete = False
        self._is_until_close = self._may_keep = self.is_sent = False

    # --- the pool's and the client's side -------------------------------------------------------

    @property
    def tls_session(self) -> tuple[str, object] | None:
        """The host, and the session that a later handshake with it may resume."""
        tls = self._transport.get_extra_info("ssl_object")
        if tls is None or tls.session is None or not tls.session.has_ticket:
            return None
        return tls.server_hostname, tls.session

    def is_fit(self) -> bool:
        """Whether nothing has come since the last answer, not even its end, of which the loop may
        not have heard yet: llama.cpp closes behind each stream without a word of it in the head.
        """
        return self.is_open and not self._poll.poll(0)

    def begin(self, response: HttpResponse, head: bytes, body: bytes | None) -> None:
        """Send this request; `head` lacks its length and its last line.

        A body that is not small stays to be sent by `send_body`.
        """
        self._start_over()
        self._response = response
        if not self.is_open:
            self._end(None)
            return
        if self._is_tls:
            # What TLS makes of our bytes only the system can count.
            self._acked_before = _acked(self.sock)
        if body is None:
            body = b""
            head += b"\r\n" if response.method in ("GET", "HEAD") else b"Content-Length: 0\r\n\r\n"
        else:
            head += b"Content-Length: %d\r\n\r\n" % len(body)
        self._request_bytes = len(head) + len(body)
        self.is_sent = len(body) <= _PIECE_BYTES
        self._transport.write(head + body if self.is_sent else head)

    async def send_body(self, response: HttpResponse, body: bytes) -> None:
        """Send what `begin` left, as fast as the upstream takes it.

        An upstream that answers before it has heard all may do so; after an error, or after the
        whole answer, the rest is of no use to it, and the connection is not used again.
        """
        view = memoryview(body)
        for start in range(0, len(body), _PIECE_BYTES):
            while self._is_write_paused and self.is_open and response.status < 300:
                await response.more()
            if self._response is not response or not self.is_open or response.status >= 300:
                return
            self._transport.write(view[start : start + _PIECE_BYTES])
        self.is_sent = True

    def resume(self) -> None:
        if self._is_paused:
            self._is_paused = False
            if self.is_open:
                self._transport.resume_reading()

    def linger(self) -> None:
        """The answer's end alone is waited for, and that not long."""
        self._is_lingering = True
        self.resume()
        self._timer = self._loop.call_later(_LINGER_S, self.abort)

    def abort(self) -> None:
        """Close here and now; what is still to be written is dropped."""
        response, self._response = self._response, None
        self._stop_timer()
        if self.is_open:
            self.is_open = False
            self._transport.abort()
        if response is not None:
            response.fail(failures.closed())

    # --- the loop's side ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._is_tls = transport.get_extra_info("ssl_object") is not None
        self._acked_before = _acked(self.sock)
        self._poll.register(self.sock.fileno(), select.POLLIN)
        self.is_open = True

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._end(error)
        # It holds our methods, and so us.
        self._parser = None
        self._forget(self)

    def eof_received(self) -> None:
        if self._response is not None and self._has_head and self._is_until_close:
            self._is_complete = True
            self._complete()
        else:
            self._end(None, is_clean=True)
        # The loop would first write what is left to be written, to somebody who has gone.
        self.abort()

    def pause_writing(self) -> None:
        self._is_write_paused = True

    def resume_writing(self) -> None:
        self._is_write_paused = False
        if self._response is not None:
            self._response.wake()

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None or self._parser is None:
            self.abort()
            return
        self._barren_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            if isinstance(error, HttpParserCallbackError) and not self._fault:
                raise
            self._may_keep = False
            if not self._is_complete:
                self._fault = self._fault or str(error)
        if self._fault:
            self._break(response)
        elif self._is_complete:
            self._complete()
        elif self._barren_bytes > BARREN_BYTES_MAX:
            self._fault = f"{BARREN_BYTES_MAX} bytes of headers or framing without an end"
            self._break(response)
        elif self._is_lingering:
            self.abort()
        else:
            if self._has_head:
                response.arrived()
            if response.is_full and not self._is_paused:
                self._is_paused = True
                self._transport.pause_reading()

    # --- the parser's side ----------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._is_complete:
            self._may_keep = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:
            self._pairs.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        response, parser = self._response, self._parser
        if response is None or parser is None or self._is_complete:
            return
        pairs, self._pairs = self._pairs, []
        status = parser.get_status_code()
        if len(pairs) > HEADERS_MAX or (
            self._barren_bytes > BARREN_BYTES_MAX
            and sum(len(name) + len(value) for name, value in pairs) > BARREN_BYTES_MAX
        ):
            self._refuse(f"more than {HEADERS_MAX} headers, or {BARREN_BYTES_MAX} bytes of them")
        self._barren_bytes = 0
        if status < 200:
            self._is_informational = True
            self._informational += 1
            if status < 100 or status == 101 or self._informational > INFORMATIONAL_MAX:
                self._refuse(f"an answer with the status {status:03} that nobody asked for")
            return
        found = collected(pairs)
        if b"transfer-encoding" in found:
            if (fault := framing_fault(pairs, parser.get_http_version())) is not None:
                self._refuse(fault)
        elif b"content-length" not in found and status not in (204, 304):
            self._is_until_close = True
        self._has_head = True
        response.begin(status, found)
        if response.method == "HEAD":
            # Its parser cannot be told that no body comes.
            self._is_complete, self._may_keep = True, False

    def on_body(self, data: bytes) -> None:
        if self._response is not None and self._has_head and not self._is_complete:
            self._barren_bytes = 0
            self._response.take(data)

    def on_message_complete(self) -> None:
        if self._is_informational:
            self._is_informational = False
        elif self._has_head and not self._is_complete and self._parser is not None:
            self._is_complete = True
            self._may_keep = self._parser.should_keep_alive()

    def _refuse(self, fault: str) -> None:
        """Stop the parser at this byte: what follows may look like an answer, but is none."""
        self._fault = fault
        raise HttpParserError(fault)

    # --- how an answer ends ---------------------------------------------------------------------

    def _complete(self) -> None:
        response = self._response
        assert response is not None
        self._stop_timer()
        if self._heard is not None:
            self._heard(self)
            self._heard = None
        self._response = None
        may_keep = self._may_keep and self.is_sent and self.is_open
        if may_keep and not self._transport.get_write_buffer_size():
            self._is_lingering = False
            self.is_used = True
            self._acked_before += self._request_bytes
            self.resume()
            self._keep(self)
        else:
            self.abort()
        response.end()

    def _break(self, response: HttpResponse) -> None:
        self._response = None
        self.abort()
        response.fail(failures.unreadable(self._fault, response.where))

    def _end(self, error: Exception | None, *, is_clean: bool = False) -> None:
        """The connection is over. Of a kept one that ended before anything of the request had
        reached the upstream's machine, that is certain: its last segment acknowledges all that it
        had received, and this request was not in it. A reset acknowledges nothing, and so tells
        nothing.
        """
        response, self._response = self._response, None
        self._stop_timer()
        if response is None:
            return
        where = response.where
        is_silent = not (self._barren_bytes or self._has_head or self._informational)
        may_tell = is_clean and is_silent and self.is_used and self._acked_before
        if may_tell and _acked(self.sock) == self._acked_before:
            response.fail(failures.stale(where))
        else:
            response.fail(failures.gone(error, where))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _acked(connection: socket.socket) -> int:
    """How many bytes the upstream's machine has acknowledged; 0 where that is not told."""
    try:
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return 0
    return int.from_bytes(told[_BYTES_ACKED], sys.byteorder)
