"""The path of a call, top to bottom: admit, plan, attempt rung after rung, settle, record.

Invariants: before the commit any failure that is the rung's moves to the next one; after it the
answer is completed once or ended by one error event. Every hold is settled exactly once, whatever
happens to the client, the upstream or the task: `settle` does not await.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

from router.backends.base import Backend, ChatAttempt, EmbedAttempt
from router.core import ladder
from router.core.ladder import Step
from router.core.retry import RetryBudget, RetrySettings
from router.errors import (
    ConnectFailed,
    Draining,
    InternalFault,
    RouterError,
    StaleConnection,
    UpstreamError,
    UpstreamTimeout,
)
from router.flow import relay
from router.flow.board import Board
from router.flow.canaries import Canaries
from router.flow.continuity import Continuity
from router.flow.gate import Gate, NotLetIn, Place, counts
from router.flow.hedge import Run, race
from router.flow.ledger import Ledger
from router.flow.observe import AttemptRecord, Observer, Record
from router.flow.progress import Progress
from router.flow.relay import together
from router.flow.sink import Provenance, Sink
from router.types import Call, ChatCall, Ladder, Rung

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
        self._canaries = Canaries()
        self._hedge_budgets: dict[str, RetryBudget] = {}
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
            record.status = 200  # that is what the client was told before it went wrong
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
        views = self._board.views(call.ladder, call.key.priority)
        return ladder.plan(call, views, self._unable)

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
        """Try the plan's rungs in order until one has answered; else end with what there is."""
        steps = self.plan(call)
        progress = Progress(call, sink)
        if await self._try_each(steps, progress, sink, record, started):
            return
        if await progress.conclude(record):
            return
        param = "messages" if isinstance(call, ChatCall) else "input"
        raise ladder.no_rung_left(call.ladder.name, steps, param)

    async def _try_each(
        self, steps: list[Step], progress: Progress, sink: Sink, record: Record, started: float
    ) -> bool:
        """Whether one of the rungs answered; False: none is left, or none may be asked any more."""
        for place, step in enumerate(steps):
            if step.take and record.attempts:
                self._recheck(progress, step)
            tries = 0
            while step.take:
                tries += 1
                later = steps[place + 1 :]
                try:
                    progress.begin(record)
                    await self._ask(progress, step, later, sink, record, started)
                    return True
                except NotLetIn as closed:
                    step.take, step.reason = False, closed.reason
                    step.cause, step.wait_s = closed.cause, closed.wait_s
                except UpstreamError as error:
                    step.error = error
                    if not progress.goes_on(error, record):
                        return False
                    if sink.is_committed:
                        break
                    has_next = self._has_room(progress, later)
                    if not await self._retries(progress, step, error, tries, started, has_next):
                        break
                    self._recheck(progress, step)
        return False

    async def _ask(
        self,
        progress: Progress,
        step: Step,
        later: list[Step],
        sink: Sink,
        record: Record,
        started: float,
    ) -> None:
        """Ask this rung, and where the ladder hedges a later one beside it once it is slow."""
        rules = progress.call.ladder
        has_next = self._has_room(progress, later)
        hedges = rules.limits.hedge_after_s > 0 and has_next
        if not hedges or rules.rescue or rules.escalate_on or record.attempts:
            await self._attempt(progress, step.rung, sink, record, started, has_next)
            return
        budget = self._hedging(rules)
        budget.deposit(self._clock())
        beside = replace(record, attempts=[], usage=None, first_token_s=None)

        def second() -> Run | None:
            other = next((one for one in later if self._has_room(progress, [one])), None)
            if other is None or not budget.withdraw(self._clock()):
                return None
            beside.attempts = list(record.attempts)
            self._board.hedges[rules.name] += 1
            return lambda lane: self._beside(progress.call, other, lane, beside, started)

        before = len(record.attempts)
        try:
            await race(
                sink,
                rules.limits.hedge_after_s,
                lambda lane: self._attempt(progress, step.rung, lane, record, started, has_next),
                second,
            )
        finally:
            _join(record, beside, before)

    async def _beside(
        self, call: Call, step: Step, lane: Sink, record: Record, started: float
    ) -> None:
        """The second attempt of a hedged call; its rung is not asked again after it."""
        progress = Progress(call, lane)
        progress.begin(record)
        step.take = False
        try:
            await self._attempt(progress, step.rung, lane, record, started, True)
        except NotLetIn as closed:
            step.reason, step.cause, step.wait_s = closed.reason, closed.cause, closed.wait_s
            raise
        except UpstreamError as error:
            step.error = error
            raise

    def _hedging(self, rules: Ladder) -> RetryBudget:
        budget = self._hedge_budgets.get(rules.name)
        if budget is None:
            settings = RetrySettings(share=rules.limits.hedge_max_share, per_s=0.0)
            budget = self._hedge_budgets[rules.name] = RetryBudget(settings, self._clock())
        return budget

    async def _attempt(
        self,
        progress: Progress,
        rung: Rung,
        sink: Sink,
        record: Record,
        started: float,
        has_next: bool,
    ) -> None:
        """One try of one rung: through its gate, open, relay. Raises NotLetIn or UpstreamError.

        Nobody waits for a place on a rung while a later one has room.
        """
        call = progress.call
        gate = self._board.gate(call.ladder, rung)
        wait_s = 0.0 if has_next else progress.queue_left_s
        waits_since = self._clock()
        is_retry = any(one.rung.name == rung.name for one in record.attempts)
        try:
            place = await gate.enter(
                call.key.priority,
                wait_s,
                queue_max=call.ladder.limits.queue_max,
                is_retry=is_retry,
            )
        finally:
            progress.queue_left_s -= self._clock() - waits_since
        attempt = AttemptRecord(rung, "failed")
        record.attempts.append(attempt)
        began, is_first = self._clock(), record.first_token_s is None
        try:
            await self._relay(progress, rung, sink, record, started, gate, place)
        except UpstreamError as error:
            attempt.cause = error.cause
            if sink.is_committed:
                record.rung = rung
            gate.failed(place, error)
            self._note_failure(call, rung, error)
            raise
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                attempt.cause = "cancelled"
            gate.left(place)
            raise
        attempt.cause = ""
        record.rung, record.status = rung, 200
        # What continues another rung's stream began with that one's first token.
        first_s = record.first_token_s if is_first else None
        gate.served(place, None if first_s is None else first_s - (began - started))

    async def _relay(
        self,
        progress: Progress,
        rung: Rung,
        sink: Sink,
        record: Record,
        started: float,
        gate: Gate,
        place: Place,
    ) -> None:
        call = progress.call
        backend = self._backends[rung.backend]
        connect_s = call.ladder.limits.connect_s
        if not isinstance(call, ChatCall):
            provenance = Provenance(rung, len(record.attempts))
            embed = EmbedAttempt(call, rung, connect_s, self._answer_bytes_max)
            await relay.embeddings(backend, embed, sink, record, provenance, self._canaries)
            return
        provenance = Provenance(rung, len(record.attempts), call.clamped_to)
        chat = ChatAttempt(call, rung, connect_s, self._answer_bytes_max)
        if not call.stream:
            await relay.answer(backend, chat, sink, record, provenance)
            return

        def speaks() -> float:
            gate.spoke(place)
            return self._clock() - started

        await relay.stream(backend, chat, sink, record, provenance, speaks, progress)

    async def _retries(
        self,
        progress: Progress,
        step: Step,
        error: UpstreamError,
        tries: int,
        started: float,
        has_next: bool,
    ) -> bool:
        """Whether to ask the same rung again; returns when it is time to."""
        call, rung = progress.call, step.rung
        is_unsent = isinstance(error, ConnectFailed | StaleConnection)
        if not self._backends[rung.backend].may_repeat and not is_unsent:
            return False
        verdict = self._board.gate(call.ladder, rung).retry(
            error,
            tries=tries,
            has_next=has_next,
            left_s=call.ladder.limits.total_s - (self._clock() - started),
        )
        if verdict.wait_s is None:
            return False
        await asyncio.sleep(verdict.wait_s)
        return True

    def _recheck(self, progress: Progress, step: Step) -> None:
        call = progress.call
        ladder.recheck(
            step, call, self._board.view(call.ladder, step.rung, call.key.priority), self._unable
        )
        progress.recheck(step, self.continuity)

    def _has_room(self, progress: Progress, later: list[Step]) -> bool:
        """Whether one of these rungs would take the call at once."""
        for step in later:
            if step.take:
                now = replace(step)
                self._recheck(progress, now)
                if now.take and self._board.gate(progress.call.ladder, step.rung).has_room():
                    return True
        return False

    def _note_failure(self, call: Call, rung: Rung, error: UpstreamError) -> None:
        """Tell the board, and raise the alarm where the rung closes for a reason to be mended."""
        if counts(error):
            self._canaries.forget(rung)
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
        closed = self._board.failed(call.ladder, rung, error, own_token=own_token)
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


def _join(record: Record, beside: Record, before: int) -> None:
    """Add the second attempt of a hedged call to the call's record."""
    mine = beside.attempts[before + 1 :] if len(beside.attempts) > before else []
    record.attempts += mine
    record.usage = together(record.usage, beside.usage)
    if beside.rung is not None:
        record.rung, record.status = beside.rung, beside.status
        record.first_token_s = beside.first_token_s


def _outcome(error: RouterError) -> str:
    """A short stable word for the metrics and the log."""
    if isinstance(error, UpstreamError):
        return error.cause
    return error.code or error.kind
