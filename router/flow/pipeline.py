"""The path of a call, top to bottom: admit, plan, attempt rung after rung, settle, record.

Invariants: before the commit any failure that is the rung's moves to the next one; after it the
answer is completed once or ended by one error event. Every hold is settled exactly once, whatever
happens to the client, the upstream or the task: `settle` does not await.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from router.backends.base import Backend, ChatAttempt, EmbedAttempt
from router.core import ladder
from router.core.ladder import Step
from router.errors import RouterError, UpstreamError, UpstreamTimeout
from router.flow import relay
from router.flow.board import Board
from router.flow.ledger import Ledger
from router.flow.observe import AttemptRecord, Observer, Record
from router.flow.sink import Provenance, Sink
from router.types import Call, ChatCall, Rung


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

    async def serve(self, call: Call, body_bytes: int, sink: Sink, record: Record) -> None:
        """Answer one call into the sink. Raises RouterError when nothing was sent.

        What goes wrong after the sink has started ends as an event of the stream, here.
        """
        started = self._clock()
        record.of_call(call)
        hold = self._ledger.admit(call.key, body_bytes)
        self._observer.in_flight += 1
        try:
            async with asyncio.timeout(call.ladder.limits.total_s):
                await self._climb(call, sink, record, started)
        except (RouterError, TimeoutError) as error:
            fault = error if isinstance(error, RouterError) else self._too_long(call)
            record.error = _outcome(fault)
            record.status = fault.status
            if not sink.is_started:
                raise fault from error
            await sink.fail(fault)
        except asyncio.CancelledError:
            record.error = "client_left"
            record.status = 499
            raise
        finally:
            self._observer.in_flight -= 1
            self._ledger.settle(hold, record.usage)
            record.total_s = self._clock() - started

    def plan(self, call: Call) -> list[Step]:
        """Which rungs this call would try now, and why not the others."""
        return ladder.plan(call, self._board.views(call.ladder.rungs), self._unable)

    async def _climb(self, call: Call, sink: Sink, record: Record, started: float) -> None:
        """Try the plan's rungs in order until one has answered."""
        steps = self.plan(call)
        for step in steps:
            if not step.take:
                continue
            attempt = AttemptRecord(step.rung)
            record.attempts.append(attempt)
            try:
                await self._attempt(call, step.rung, sink, record, started)
            except UpstreamError as error:
                attempt.cause = error.cause
                step.error = error
                self._note_failure(call, step.rung, error)
                if sink.is_committed or not error.moves_on:
                    raise
            except asyncio.CancelledError:
                attempt.cause = "cancelled"
                raise
            else:
                record.rung = step.rung
                record.status = 200
                return
        raise ladder.no_rung_left(call.ladder.name, steps)

    async def _attempt(
        self, call: Call, rung: Rung, sink: Sink, record: Record, started: float
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
                backend, chat, sink, record, provenance, lambda: self._clock() - started
            )
            if record.first_token_s is not None:
                self._board.answered(rung, record.first_token_s - (began - started))
        finally:
            self._board.ended(rung)

    def _note_failure(self, call: Call, rung: Rung, error: UpstreamError) -> None:
        self._board.failed(rung, error, own_token=call.key.token is not None)
        if error.code == "upstream_auth":
            self._backends[rung.backend].credential.reload()

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
