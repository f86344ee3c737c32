"""The client's side of a call: whole answers, or an event stream written as it comes.

Writing waits while the client does not read. A stream that waits says so by comments, so that
neither the client nor a proxy between takes it for dead; these may go out before any rung has
answered, and then the headers cannot name one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from urllib.parse import quote

from router.api.answer import Stream, lines, send_whole
from router.api.reply import error_frame
from router.api.request import Request
from router.core.accounts import shown_usd
from router.core.sse import DONE_FRAME, comment
from router.errors import RouterError
from router.flow.sink import Provenance
from router.flow.tasks import Tasks
from router.flow.watch import Watch
from router.types import Answer, Embeddings

_STREAM_LINES = lines(
    {
        "Content-Type": "text/event-stream",
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",
    }
)
_KEEP_ALIVE = comment("keep-alive")
# How long a backend's comment may wait for the answer that would go before it.
_COMMENT_HOLD_S = 2.0
# How long a failed stream's last bytes may take to a client that has stopped reading.
_LINGER_S = 5.0


class HttpSink:
    """The answer to one HTTP request.

    `head` gives the lines that go on every answer. `render` writes embeddings in the form that the
    route owes.
    """

    __slots__ = (
        "_beating",
        "_expected_at",
        "_head",
        "_is_ended",
        "_keepalive_s",
        "_loop",
        "_render",
        "_request",
        "_stream",
        "_tasks",
        "_watch",
        "_words",
        "_wrote_at",
        "deadline",
        "is_committed",
        "is_started",
    )

    def __init__(
        self,
        request: Request,
        head: Callable[[], str],
        *,
        keepalive_s: float,
        tasks: Tasks,
        render: Callable[[Embeddings], bytes] | None = None,
    ) -> None:
        self._request = request
        self._head = head
        self._keepalive_s = keepalive_s
        self._tasks = tasks
        self._render = render
        self._stream: Stream | None = None
        self._watch: Watch | None = None
        self.deadline = 0.0
        self._beating: asyncio.Task[None] | None = None
        self._words = _KEEP_ALIVE
        self._expected_at = self._wrote_at = 0.0
        self._is_ended = False
        self.is_committed = False
        self.is_started = False

    async def send_answer(self, answer: Answer, provenance: Provenance) -> None:
        await self._whole(answer.body, provenance)

    async def send_embeddings(self, answer: Embeddings, provenance: Provenance) -> None:
        assert self._render is not None
        await self._whole(self._render(answer), provenance)

    def expect_stream(self) -> None:
        """A stream will be the answer: from now on a client that waits gets comments."""
        self._loop = asyncio.get_running_loop()
        self._expected_at = self._wrote_at = self._loop.time()
        self._watch = Watch.of(self._loop)
        self._look_at(self._wrote_at + self._keepalive_s)

    async def write(self, frames: bytes, provenance: Provenance) -> None:
        self.is_committed = True
        stream = self._stream or self._start(provenance)
        self._wrote_at = self._loop.time()
        stream.write(frames)
        if self._request.is_full:
            await self._request.drain()

    def write_now(self, frames: bytes) -> bool:
        stream = self._stream
        if stream is None or not self.is_committed or not stream.write_now(frames):
            return False
        self._wrote_at = self._loop.time()
        return True

    async def comment(self, frame: bytes) -> None:
        if self.is_committed:
            return
        if self._stream is None:
            # Headers that go out now can name no rung and turn no failure into a status, so the
            # words wait a little for an answer.
            self._words = frame
            if self._loop.time() - self._expected_at < _COMMENT_HOLD_S:
                limit = self._loop.time() + _COMMENT_HOLD_S
                if self.deadline > limit:
                    self._look_at(limit)
                return
        await self._say(frame)

    async def end(self, frames: bytes, provenance: Provenance) -> None:
        self.is_committed = True
        stream = self._stream or self._start(provenance)
        self._rest()
        if provenance.cost_nanousd is not None:
            frames += comment(f"rungway cost_usd={shown_usd(provenance.cost_nanousd)}")
        self._is_ended = True
        stream.finish(frames + DONE_FRAME)
        if self._request.is_full:
            await self._request.drain()

    async def cut(self, frames: bytes, provenance: Provenance) -> bool:
        return False

    async def fail(self, error: RouterError) -> None:
        """One error event, flushed; then the connection closes without the last chunk."""
        assert self._stream is not None
        self._rest()
        request = self._request
        request.part()
        if self._is_ended:
            # The last chunk is on its way to a client that does not take it.
            request.abort()
            return
        self._is_ended = True
        self._stream.write(error_frame(error))
        if request.is_full:
            await request.drain()
        request.close()
        self._loop.call_later(_LINGER_S, request.abort)

    def when_left(self, act: Callable[[], None] | None) -> None:
        self._request.when_left(act)

    def close(self) -> None:
        """The call is over, however it ended."""
        self._rest()

    async def _whole(self, body: bytes, provenance: Provenance) -> None:
        self.is_committed = True
        await send_whole(self._request, self._head() + provenance_lines(provenance), body)

    def _start(self, provenance: Provenance | None) -> Stream:
        """A stream, whose head goes out with its first bytes."""
        head = _STREAM_LINES + self._head()
        if provenance is not None:
            head += provenance_lines(provenance)
        self._stream = stream = Stream(self._request, head)
        self.is_started = True
        return stream

    def expire(self) -> None:
        """Send a comment if nothing was written for long; then look again in time."""
        now = self._loop.time()
        waited_s = now - self._wrote_at
        has_words = self._stream is None and self._words is not _KEEP_ALIVE
        if has_words or waited_s >= self._keepalive_s:
            waited_s = 0.0
            if self._beating is None or self._beating.done():
                self._beating = self._tasks.spawn(self._beat(), "keep-alive comment")
        self._look_at(now + self._keepalive_s - waited_s)

    def _look_at(self, moment: float) -> None:
        self.deadline = moment
        if self._watch is not None:
            self._watch.add(self)

    async def _beat(self) -> None:
        try:
            words, self._words = self._words, _KEEP_ALIVE
            await self._say(words)
        except ConnectionError:
            # The client left; the call's own task is told by the server.
            return

    async def _say(self, words: bytes) -> None:
        """Send a comment, after a head that names no rung where none went out yet."""
        stream = self._stream or self._start(None)
        self._wrote_at = self._loop.time()
        stream.write(words)
        if self._request.is_full:
            await self._request.drain()

    def _rest(self) -> None:
        if self._watch is not None:
            self._watch.patient.discard(self)
            self._watch = None
        if self._beating is not None:
            self._beating.cancel()


def provenance_lines(provenance: Provenance) -> str:
    found = f"x-rungway-attempts: {provenance.attempts}\r\n"
    if provenance.rung is not None:
        found += f"x-rungway-rung: {header_text(provenance.rung.name)}\r\n"
    if provenance.cost_nanousd is not None:
        found += f"x-rungway-cost-usd: {shown_usd(provenance.cost_nanousd)}\r\n"
    if provenance.clamped_to is not None:
        found += f"x-rungway-clamped: {provenance.clamped_to}\r\n"
    return found


def header_text(name: str) -> str:
    """A rung's name as it may stand in a header: models may be file paths in any script."""
    return name if name.isascii() else quote(name, safe="/:@!$&'()*+,;= ")
