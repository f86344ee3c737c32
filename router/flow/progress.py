"""How far one call has come over its rungs, beyond the attempts that its record lists.

Two things outlive an attempt that failed: the text that the client was given of a stream, where
the ladder has another rung continue it, and an answer that was escalated, which is still better
than none. Without either a call's progress is its plan's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from router.backends.base import Event, EventKind, EventStream, Take
from router.core import rescue, sse
from router.core.ladder import Step
from router.core.rescue import Given, Seam
from router.errors import Escalated, UpstreamError
from router.flow.observe import Record
from router.flow.sink import Provenance, Sink
from router.types import Answer, Call, ChatCall, Rung, Usage

_CHARS_PER_TOKEN_MAX = 6


class Continues(Protocol):
    """What knows of each rung whether its model goes on with a text that was begun."""

    def why_not(self, rung: Rung) -> str | None: ...


class Progress:
    """One call's progress. `call` is what the next attempt is to put: the client's or the rest.

    `given` follows what the client is given, where it may be continued; `spent` is what the
    attempts used that the answer goes on from.
    """

    def __init__(self, call: Call, sink: Sink) -> None:
        self._call = call
        self._sink = sink
        self._may_rescue = (
            call.ladder.rescue
            and isinstance(call, ChatCall)
            and call.stream
            and not call.ladder.commit_complete
            and rescue.unable(call.body) is None
        )
        self._broken: UpstreamError | None = None
        self._kept: Answer | bytes | None = None
        self._kept_from: Provenance | None = None
        self.call = call
        self.given: Given | None = None
        self.spent: Usage | None = None
        # Of all the rungs together: who waits for one may not wait as long again for the next.
        self.queue_left_s = call.ladder.limits.queue_s

    def recheck(self, step: Step, continuity: Continues) -> None:
        """Leave out a rung that cannot take the text so far as a prefix."""
        if step.take and self._is_continuing and (why := continuity.why_not(step.rung)):
            step.take, step.reason, step.cause = False, why, "unable"

    def begin(self, record: Record) -> None:
        """An attempt begins: from nothing, or from what was given."""
        if self.call is self._call:
            self.spent = None
            record.first_token_s = None
            if isinstance(self._call, ChatCall) and self._may_rescue:
                self.given = Given(self._call.body)

    def join(self, opened: EventStream, who: str) -> EventStream:
        """The attempt's stream, which a continued one makes one with the stream before."""
        if not self._is_continuing or self.given is None:
            return opened
        return _JoinedStream(opened, Seam(self.given, self.spent, who=who))

    def let_go(self, call: ChatCall) -> None:
        """Of the prompt, once this attempt's content has gone out and no other may go on with it:
        nobody is asked again, and thousands of streams may last long."""
        if self.given is None and self._sink.is_committed:
            for asked in (self._call, call):
                if isinstance(asked, ChatCall):
                    asked.body.pop("messages", None)

    def goes_on(self, error: UpstreamError, record: Record) -> bool:
        """Whether another rung may be tried after this failure, and with what."""
        # Its words are what is wanted of it; the frames that it came through know this object.
        self._broken = error.with_traceback(None)
        if isinstance(error, Escalated):
            self._kept = error.answer
            self._kept_from = Provenance(
                record.attempts[-1].rung, len(record.attempts), _clamped(self._call)
            )
        if not error.moves_on:
            return False
        if not self._sink.is_committed:
            return True
        given = self.given
        if given is None or given.why_not() is not None:
            return False
        given.drop_queued()
        if given.is_spent:
            return False
        self.call = _continued(self._call, given)
        return True

    async def conclude(self, record: Record) -> bool:
        """The rungs are used up: end with what there is; False where there is nothing.

        Raises the last failure where the client has had a part of the answer or may not be
        answered by another rung.
        """
        sink, given = self._sink, self.given
        if self._kept is not None and self._kept_from is not None and not sink.is_committed:
            # The last one asked stands highest on the ladder, so its word is the best to be had.
            if isinstance(self._kept, Answer):
                await sink.send_answer(self._kept, self._kept_from)
            else:
                await sink.end(self._kept, self._kept_from)
            record.rung, record.status = self._kept_from.rung, 200
            return True
        if self._broken is None:
            return False
        if sink.is_committed and given is not None and given.why_not() is None and given.is_spent:
            wants_usage = isinstance(self._call, ChatCall) and self._call.wants_usage
            payloads = rescue.closing(given, self.spent if wants_usage else None)
            frames = b"".join(sse.frame(payload) for payload in payloads)
            last = record.attempts[-1].rung
            cost = record.admission.charged if record.admission is not None else None
            await sink.end(frames, Provenance(last, len(record.attempts), cost_nanousd=cost))
            record.rung, record.status = last, 200
            return True
        if sink.is_committed or not self._broken.moves_on:
            broken, self._broken = self._broken, None
            try:
                raise broken
            finally:
                # An error knows the frames that it came through, and this one would know it.
                del broken
        return False

    @property
    def _is_continuing(self) -> bool:
        return self.call is not self._call


class _JoinedStream:
    """A continued stream, its chunks joined to the first one's."""

    def __init__(self, opened: EventStream, seam: Seam) -> None:
        self._opened = opened
        self._seam = seam

    async def read(self, take: Take | None = None) -> list[Event]:
        while events := await self._opened.read():
            joined = [one for event in events for one in self._joined(event)]
            if joined:
                return joined
        return _chunks(self._seam.end())

    def close(self) -> None:
        self._opened.close()

    def _joined(self, event: Event) -> list[Event]:
        if event.kind is EventKind.CHUNK:
            return _chunks(self._seam.join(event.data))
        if event.kind is EventKind.DONE:
            return [*_chunks(self._seam.end()), event]
        return [event]


def _chunks(payloads: list[bytes]) -> list[Event]:
    return [Event(EventKind.CHUNK, payload) for payload in payloads]


def _continued(call: Call, given: Given) -> ChatCall:
    assert isinstance(call, ChatCall)
    needs = call.needs
    chars = len(given.text)
    return replace(
        call,
        body=rescue.continuation(call.body, given.text, given.tokens),
        needs=replace(
            needs,
            prompt_chars=needs.prompt_chars + chars,
            prompt_tokens_min=needs.prompt_tokens_min + chars // _CHARS_PER_TOKEN_MAX,
        ),
    )


def _clamped(call: Call) -> int | None:
    return call.clamped_to if isinstance(call, ChatCall) else None
