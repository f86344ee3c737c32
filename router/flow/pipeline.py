"""The path of a call, top to bottom: admit, plan, attempt rung after rung, settle, record.

Invariants: before the commit any failure that is the rung's moves to the next one; after it the
answer is completed once or ended by one error event. Every hold is settled exactly once, whatever
happens to the client, the upstream or the task: `settle` does not await.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from router.backends.base import Backend, ChatAttempt, EmbedAttempt
from router.core import ladder
from router.core.ladder import Step
from router.errors import Draining, InternalFault, RouterError, UpstreamError, UpstreamTimeout
from router.flow import relay
from router.flow.board import Board
from router.flow.continuity import Continuity
from router.flow.ledger import Ledger
from router.flow.observe import AttemptRecord, Observer, Record
from router.flow.progress import Progress
from router.flow.sink import Provenance, Sink
from router.types import Call, ChatCall, Rung

_log = logging.getLogger("rungway")


class Pipeline:
    """Serves calls over the backends of one configuration. `clock` gives monotonic seconds."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        board: Board,
        ledger: Ledger,
        observer: Observer,
        clock: Callable[[], float],
        answer_bytes_max: int,
    ) -> None:
        self._backends = backends
        self._board = board
        self._ledger = ledger
        self._observer = observer
        self._clock = clock
        self._answer_bytes_max = answer_bytes_max
        self._serving: set[asyncio.Task[object]] = set()
        self._is_ending = False
        self.continuity = Continuity(backends, board)

    async def serve(self, call: Call, body_bytes: int, sink: Sink, record: Record) -> None:
        """Answer one call into the sink. Raises RouterError when nothing was sent.

        What goes wrong after the sink has started ends as an event of the stream, here.
        """
        started = self._clock()
        record.of_call(call)
        hold = self._ledger.admit(call.key, body_bytes)
        self._observer.in_flight += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            await self._within_total(call, sink, record, started)
        except RouterError as fault:
            record.error, record.status = _outcome(fault), fault.status
            if not sink.is_started:
                raise
            await sink.fail(fault)
        except (asyncio.CancelledError, ConnectionError):
            record.error, record.status = "client_left", 499
            raise
        finally:
            self._serving.discard(task)
            self._observer.in_flight -= 1
            self._ledger.settle(hold, record.usage)
            record.total_s = self._clock() - started

    def plan(self, call: Call) -> list[Step]:
        """Which rungs this call would try now, and why not the others."""
        return ladder.plan(call, self._board.views(call.ladder.rungs), self._unable)

    async def drain(self, limit_s: float) -> None:
        """Let what is being served end within the limit, then end it: each client hears why."""
        if self._serving:
            await asyncio.wait(set(self._serving), timeout=limit_s)
        self._is_ending = True
        for task in self._serving:
            task.cancel()

    async def _within_total(self, call: Call, sink: Sink, record: Record, started: float) -> None:
        """Climb within the ladder's total time; whatever fails fails as a RouterError."""
        try:
            async with asyncio.timeout(call.ladder.limits.total_s):
                await self._climb(call, sink, record, started)
        except TimeoutError as error:
            raise self._too_long(call) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._is_ending or task is None:
                raise
            task.uncancel()
            raise Draining("Rungway is going down and could not wait for this answer") from None
        except (RouterError, ConnectionError):
            raise
        except Exception as error:
            # The edge of the flow: a fault of ours must end this call alone, and in its envelope.
            _log.exception("%s failed in a way nobody foresaw", record.call_id)
            words = f"Rungway failed; its log has the trace of {record.call_id}"
            raise InternalFault(words) from error

    async def _climb(self, call: Call, sink: Sink, record: Record, started: float) -> None:
        """Try the plan's rungs in order until one has answered."""
        steps = self.plan(call)
        progress = Progress(call, sink)
        for step in steps:
            if step.take and record.attempts:
                call = progress.call
                ladder.recheck(step, call, self._board.view(step.rung), self._unable)
                progress.recheck(step, self.continuity)
            if not step.take:
                continue
            attempt = AttemptRecord(step.rung, "failed")
            record.attempts.append(attempt)
            try:
                progress.begin(record)
                await self._attempt(call, step.rung, sink, record, started, progress)
            except UpstreamError as error:
                attempt.cause = error.cause
                step.error = error
                self._note_failure(call, step.rung, error)
                if not progress.goes_on(error, record):
                    break
            except asyncio.CancelledError:
                attempt.cause = "cancelled"
                raise
            else:
                attempt.cause = ""
                record.rung = step.rung
                record.status = 200
                return
        if await progress.conclude(record):
            return
        param = "messages" if isinstance(call, ChatCall) else "input"
        raise ladder.no_rung_left(call.ladder.name, steps, param)

    async def _attempt(
        self,
        call: Call,
        rung: Rung,
        sink: Sink,
        record: Record,
        started: float,
        progress: Progress,
    ) -> None:
        """One try of one rung: open, relay."""
        backend = self._backends[rung.backend]
        connect_s = call.ladder.limits.connect_s
        began = self._clock()
        self._board.began(rung)
        try:
            if not isinstance(call, ChatCall):
                provenance = Provenance(rung, len(record.attempts))
                embed = EmbedAttempt(call, rung, connect_s, self._answer_bytes_max)
                await relay.embeddings(backend, embed, sink, record, provenance)
                return
            provenance = Provenance(rung, len(record.attempts), call.clamped_to)
            chat = ChatAttempt(call, rung, connect_s, self._answer_bytes_max)
            if not call.stream:
                await relay.answer(backend, chat, sink, record, provenance)
                return
            await relay.stream(
                backend, chat, sink, record, provenance, lambda: self._clock() - started, progress
            )
            if record.first_token_s is not None and record.first_token_s >= began - started:
                # Else the first token was another rung's, whose answer this one continued.
                self._board.answered(rung, record.first_token_s - (began - started))
        finally:
            self._board.ended(rung)

    def _note_failure(self, call: Call, rung: Rung, error: UpstreamError) -> None:
        """Tell the board, and raise the alarm where the rung closes for a reason to be mended."""
        backend = self._backends[rung.backend]
        if error.cause == "echoed":
            self.continuity.refute(rung)
        error.message = backend.credential.hide(error.message)
        if call.key.token:
            error.message = error.message.replace(call.key.token, "[token]")
        if error.code == "upstream_auth" and backend.credential.reload():
            # A new token may be good: the next call finds out.
            return
        own_token = call.key.token is not None and backend.takes_key_tokens
        closed = self._board.failed(rung, error, own_token=own_token)
        if closed is not None and error.cause == "refused":
            what = "backend" if error.closes == "backend" else "rung"
            _log.error("ALARM: the %s of %s is %s", what, rung.name, closed)
            self._board.alarms[rung.name] += 1

    def _unable(self, call: Call, rung: Rung) -> str | None:
        return self._backends[rung.backend].unable(call, rung)

    @staticmethod
    def _too_long(call: Call) -> UpstreamTimeout:
        limit_s = call.ladder.limits.total_s
        return UpstreamTimeout(
            f"the call passed its ladder's limit of {limit_s:g} s (total_s)", phase="total"
        )


def _outcome(error: RouterError) -> str:
    """A short stable word for the metrics and the log."""
    if isinstance(error, UpstreamError):
        return error.cause
    return error.code or error.kind
