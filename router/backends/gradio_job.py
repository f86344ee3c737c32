"""One job in a Space's queue, followed to its end: for an answer as a whole, or as OpenAI chunks.

The messages are read by `core/gradio.py`; here is the connection that brings them, and the duty to
call off a job that is left before it is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from router.backends.base import ChatAttempt, Event, EventKind, Take
from router.core import answers, gradio
from router.core.sse import SseEvent, SseOverflow, SseParser
from router.errors import UpstreamBroken, UpstreamError
from router.transport.http import HttpResponse
from router.types import Json


class Heard(NamedTuple):
    """What one read of a job's stream brought."""

    comments: list[str]
    has_value: bool
    is_completed: bool


class Job:
    """One posted job and its open stream; `value` is the answer as far as it is known."""

    def __init__(
        self,
        response: HttpResponse,
        watch: gradio.JobWatch,
        who: str,
        event_bytes_max: int,
        call_off: Callable[[], None],
    ) -> None:
        self._response = response
        self._watch = watch
        self._who = who
        self._parser = SseParser(event_bytes_max)
        self._call_off = call_off
        self._failure: UpstreamError | None = None
        self._is_closed = False

    @property
    def value(self) -> Any:
        return self._watch.value

    async def outcome(self) -> Any:
        """The final value; the job is called off where nobody waits for it any more."""
        try:
            while not (await self.read()).is_completed:
                continue
            return self.value
        finally:
            self.close()

    async def read(self) -> Heard:
        """What came next. Raises UpstreamError, but only after what came before the error."""
        while True:
            if self._failure is not None:
                raise self._failure
            data = await self._response.read_chunk()
            try:
                found = self._parser.feed(data) if data else self._parser.finish()
            except SseOverflow as error:
                raise UpstreamBroken(f"{self._who}: {error}") from error
            heard = self._follow(found)
            if not data and not self._watch.is_over:
                self._failure = UpstreamBroken(f"{self._who} ended the stream before the job's end")
            if heard.comments or heard.has_value:
                return heard

    def close(self) -> None:
        """Leave; a job that is not over is called off. May be called more than once."""
        if self._is_closed:
            return
        self._is_closed = True
        self._response.close()
        if not self._watch.is_over:
            self._call_off()

    def _follow(self, found: list[SseEvent]) -> Heard:
        comments: list[str] = []
        has_value = False
        for sse in found:
            try:
                step = self._watch.see(sse.data)
            except UpstreamError as error:
                self._failure = error
                break
            if step.comment:
                comments.append(step.comment)
            has_value |= step.has_value
            if step.is_completed:
                return Heard(comments, True, True)
        return Heard(comments, has_value, False)


class SpaceStream:
    """A job as a stream of OpenAI chunks."""

    def __init__(self, job: Job, attempt: ChatAttempt) -> None:
        self._job = job
        self._who = attempt.rung.name
        self._call_id = attempt.call.id
        self._model = attempt.rung.model
        self._created = int(time.time())
        self._sent = gradio.TextSent(self._who)
        self._has_role = False
        self._has_ended = False

    async def read(self, take: Take | None = None) -> list[Event]:
        while not self._has_ended:
            heard = await self._job.read()
            events = [Event(EventKind.COMMENT, text.encode()) for text in heard.comments]
            if heard.has_value:
                text = gradio.text_of(self._job.value, who=self._who)
                delta = self._sent.take(text, is_final=heard.is_completed)
                if delta or (heard.is_completed and not self._has_role):
                    events.append(self._said(delta))
            if heard.is_completed:
                self._has_ended = True
                events += [self._chunk({}, "stop"), Event(EventKind.DONE, b"")]
                self._job.close()
            if events:
                return events
        return []

    def close(self) -> None:
        self._has_ended = True
        self._job.close()

    def _said(self, delta: str) -> Event:
        role = {} if self._has_role else {"role": "assistant"}
        self._has_role = True
        return self._chunk({**role, "content": delta})

    def _chunk(self, delta: Json, finish_reason: str | None = None) -> Event:
        payload = answers.build_chunk(
            call_id=self._call_id,
            created=self._created,
            model=self._model,
            delta=delta,
            finish_reason=finish_reason,
        )
        return Event(EventKind.CHUNK, payload)
