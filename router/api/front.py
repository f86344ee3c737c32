"""The server that clients meet first: all that is asked for in a plain way, served at a tenth of
what aiohttp takes. A connection on which anything else comes is aiohttp's from then on.

What it reads by itself `head` defines, and only where the whole head came at once. A request that
comes while another is served is not read: its connection closes after that answer, since it must be
read on to see the client leave, and no client needs pipelining.

Each request has a task. It begins when the body is there; and also when the body is too large to be
taken from just anybody, is late, or will never come: what to say then is the handler's matter. One
timer for all connections, and not one each, looks for those that have waited too long.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import cast

from router.api.head import HEAD_BYTES_MAX, Head, read_head, starts_of
from router.api.request import Request

# A larger body is read as the handler asks for it, which knows by then whose it is.
_BODY_BYTES_UNASKED = 64 << 10
# What is left of a body that nobody read is taken off the wire, for the answer's sake.
_LINGER_S = 2.0
_LOOK_EVERY_S = 0.5
_NEVER = math.inf
_NO_HEADERS: Mapping[str, bytes] = {}


class FrontRequest:
    """One request. Its connection may end, or be another request's, before its task does."""

    __slots__ = (
        "_act",
        "_front",
        "_headers",
        "_held_bytes",
        "_is_kept",
        "_parts",
        "_waiter",
        "body_bytes",
        "is_begun",
        "method",
        "missing_bytes",
        "target",
        "task",
        "waited_s",
    )
    is_http_1_1 = True

    def __init__(self, front: Front, head: Head, body: bytes, waited_s: float) -> None:
        """`body` is what has come of it."""
        self._front = front
        self.method, self.target, self._headers, self.body_bytes, self._is_kept = head
        self.missing_bytes = self.body_bytes - len(body)
        self._parts = [body]
        self._held_bytes = len(body)
        self._waiter: asyncio.Future[None] | None = None
        self._act: Callable[[], None] | None = None
        self.task: asyncio.Task[None] | None = None
        self.is_begun = False
        self.waited_s = waited_s

    @property
    def peer(self) -> object:
        return self._front.transport.get_extra_info("peername")

    def header(self, name: str) -> str | None:
        value = self._headers.get(name)
        return None if value is None else value.strip(b" \t").decode("utf-8", "surrogateescape")

    # --- its body -------------------------------------------------------------------------------

    def take_body(self) -> bytes | None:
        return None if self.missing_bytes else self._taken()

    async def read(self) -> bytes:
        while not self._held_bytes and self.missing_bytes:
            if self._front.is_lost:
                raise ConnectionResetError("the client has left")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._taken()

    def feed(self, data: bytes) -> None:
        """Take some more of the body."""
        self._parts.append(data)
        self._held_bytes += len(data)
        self.missing_bytes -= len(data)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self._held_bytes > _BODY_BYTES_UNASKED:
            self._front.pause_reading()

    def _taken(self) -> bytes:
        parts, self._parts, self._held_bytes = self._parts, [], 0
        self._front.resume_reading()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    # --- its answer -----------------------------------------------------------------------------

    @property
    def is_kept(self) -> bool:
        return self._is_kept and not self._front.is_last

    @property
    def is_full(self) -> bool:
        return self._front.is_full

    def part(self) -> None:
        self._is_kept = False

    def write(self, data: bytes) -> None:
        front = self._front
        if front.is_lost or front.transport.is_closing():
            raise ConnectionResetError("the client has left")
        if not self.is_begun:
            self.is_begun = True
            # Nobody asks any more, and a stream may last.
            self._headers = _NO_HEADERS
        front.transport.write(data)

    def write_now(self, data: bytes) -> bool:
        front = self._front
        if front.is_full or front.is_lost or front.transport.is_closing():
            return False
        front.transport.write(data)
        return True

    async def drain(self) -> None:
        await self._front.drain()

    def close(self) -> None:
        self._front.close_when_sent()

    def abort(self) -> None:
        self._front.transport.abort()

    def when_left(self, act: Callable[[], None] | None) -> None:
        self._act = act

    def lose(self) -> None:
        """The client has left."""
        act, self._act = self._act, None
        if act is not None:
            act()
        elif self.task is not None:
            self.task.cancel()


class Fronts:
    """All connections that are the front's.

    `hot` are the methods and targets that most ask for; `hand_over` takes a connection for good,
    with what was read since the start of a request; `is_crowded` tells that there are too many.
    """

    def __init__(
        self,
        handle: Callable[[Request], Awaitable[None]],
        hand_over: Callable[[Front, bytes], None],
        is_crowded: Callable[[], bool],
        hot: list[tuple[str, str]],
        *,
        header_s: float,
        stall_s: float,
        idle_s: float,
    ) -> None:
        self._handle = handle
        self._hand_over = hand_over
        self._is_crowded = is_crowded
        self.starts = starts_of(hot)
        self.header_s, self.stall_s, self.idle_s = header_s, stall_s, idle_s
        self._look_every_s = min(_LOOK_EVERY_S, header_s / 4, stall_s / 4, idle_s / 4)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.open: set[Front] = set()

    def due_in(self, limit_s: float) -> float:
        return self._loop.time() + limit_s

    def join(self, front: Front) -> None:
        self.open.add(front)
        if self._is_crowded():
            front.close_when_sent()
            return
        front.due = self.due_in(self.header_s)
        if self._timer is None:
            self._timer = self._loop.call_later(self._look_every_s, self._look)

    def leave(self, front: Front) -> None:
        self.open.discard(front)

    def hand_over(self, front: Front, data: bytes) -> None:
        self.open.discard(front)
        self._hand_over(front, data)

    def start(self, front: Front, request: FrontRequest) -> None:
        request.task = task = self._loop.create_task(self._serve(front, request))
        self._tasks.add(task)

    def pre_shutdown(self) -> None:
        """Connections without a request close; the others after its answer."""
        for front in list(self.open):
            front.end()

    async def shutdown(self, limit_s: float | None) -> None:
        """End what is under way: it may take so long by itself, and so long when it is told to."""
        self.pre_shutdown()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=limit_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=limit_s)
        for front in list(self.open):
            front.close_when_sent()

    async def _serve(self, front: Front, request: FrontRequest) -> None:
        try:
            await self._handle(request)
        except (ConnectionError, asyncio.CancelledError):
            # A task that ends as cancelled keeps that, and with it all that it held, until the
            # garbage collector comes.
            request.part()
        except BaseException:
            # What has begun may lack its end.
            request.part()
            raise
        finally:
            if request.task is not None:
                self._tasks.discard(request.task)
                request.task = None
            front.answered(request)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        for front in [front for front in self.open if front.due <= now]:
            front.expire()
        if self.open:
            self._timer = self._loop.call_later(self._look_every_s, self._look)


class Front(asyncio.Protocol):
    """One connection, as long as only plain requests come on it.

    `due`: when it has waited too long for what it waits for. `is_full`: the client does not read.
    `is_last`: no other request is served on it.
    """

    __slots__ = (
        "_body_at",
        "_drained",
        "_fronts",
        "_head",
        "_is_reading",
        "_raw",
        "_request",
        "_unread_bytes",
        "due",
        "is_full",
        "is_last",
        "is_lost",
        "transport",
    )
    transport: asyncio.Transport

    def __init__(self, fronts: Fronts) -> None:
        self._fronts = fronts
        # Of a request whose body has not all come: its head, and all its bytes so far.
        self._head: Head | None = None
        self._raw = b""
        self._body_at = 0
        self._request: FrontRequest | None = None
        self._drained: asyncio.Future[None] | None = None
        self._is_reading = True
        # Of a request that was answered without them.
        self._unread_bytes = 0
        self.due = _NEVER
        self.is_full = self.is_last = self.is_lost = False

    # --- the loop's side ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if (sock := transport.get_extra_info("socket")) is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._fronts.join(self)

    def data_received(self, data: bytes) -> None:
        request = self._request
        if request is not None:
            missing = request.missing_bytes
            if len(data) > missing:
                self.is_last = True
                data = data[:missing]
            if data:
                request.feed(data)
        elif self._head is not None:
            self._take(self._head, self._raw + data)
        elif self._unread_bytes:
            unread, rest = self._unread_bytes, data[self._unread_bytes :]
            self._unread_bytes = max(0, unread - len(data))
            if not self._unread_bytes:
                self._rest()
            if rest:
                self.data_received(rest)
        elif not self.is_last:
            head = None
            end = data.find(b"\r\n\r\n", 0, HEAD_BYTES_MAX)
            if end > 0:
                head = read_head(data[:end], self._fronts.starts)
            if head is None:
                self._fronts.hand_over(self, data)
                return
            self._body_at = end + 4
            self._take(head, data)

    def pause_writing(self) -> None:
        self.is_full = True
        self.due = self._fronts.due_in(self._fronts.stall_s)

    def resume_writing(self) -> None:
        self.is_full = False
        if self._request is not None:
            self.due = _NEVER
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        self._fronts.leave(self)
        self._wake()
        if self._head is not None:
            self._start(self._head, self._raw)
        elif self._request is not None:
            self._request.lose()
        self._request = None

    # --- the request's side ---------------------------------------------------------------------

    async def drain(self) -> None:
        while self.is_full and not self.is_lost:
            if self._drained is None:
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)

    def pause_reading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if not self._is_reading:
            self._is_reading = True
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def close_when_sent(self) -> None:
        self.is_last = True
        self.due = self._fronts.due_in(self._fronts.stall_s)
        self.transport.close()

    def answered(self, request: FrontRequest) -> None:
        """The request's task has ended."""
        if self._request is not request:
            return
        self._request = None
        if self.transport.is_closing():
            return
        self.is_last |= not request.is_kept or not request.is_begun
        self._unread_bytes = request.missing_bytes
        self.resume_reading()
        if self._unread_bytes:
            self.due = self._fronts.due_in(_LINGER_S)
        else:
            self._rest()

    # --- the timer's side -----------------------------------------------------------------------

    def expire(self) -> None:
        """What this connection waits for has not come in time."""
        if self.is_full or self.transport.is_closing():
            self.transport.abort()
        elif self._head is not None:
            self._start(self._head, self._raw)
        else:
            self.close_when_sent()

    def end(self) -> None:
        """Serve what has begun, and nothing else."""
        self.is_last = True
        if self._request is None and self._head is None:
            self.close_when_sent()

    # --------------------------------------------------------------------------------------------

    def _take(self, head: Head, raw: bytes) -> None:
        """Start with this request if it may start; `raw` is all that came since its first byte."""
        missing = head.body_bytes - (len(raw) - self._body_at)
        if missing < 0:
            # What follows may be no request, and aiohttp's word for it is the one that counts.
            self._fronts.hand_over(self, raw)
        elif missing and head.body_bytes <= _BODY_BYTES_UNASKED:
            # Most clients send head and body in two writes.
            if self._head is None:
                self._head, self.due = head, self._fronts.due_in(0)
            self._raw = raw
        else:
            self._start(head, raw)

    def _start(self, head: Head, raw: bytes) -> None:
        waited_s = 0.0
        if self._head is not None:
            waited_s = self._fronts.due_in(0) - self.due
            self._head, self._raw = None, b""
        self.due = _NEVER
        self._request = request = FrontRequest(self, head, raw[self._body_at :], waited_s)
        self._fronts.start(self, request)

    def _rest(self) -> None:
        """Wait for another request, if there may be one."""
        if self.is_last:
            self.close_when_sent()
        else:
            self.due = self._fronts.due_in(self._fronts.idle_s)

    def _wake(self) -> None:
        if self._drained is not None:
            self._drained.set_result(None)
            self._drained = None
