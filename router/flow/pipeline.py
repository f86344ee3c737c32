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
from functools import partial

from router.backends.base import Backend, State
from router.core import ladder
from router.core.embeddings import estimate_tokens
from router.core.ladder import Plan, Step, Unaffordable
from router.core.retry import RetryBudget, RetrySettings
from router.errors import (
    ConnectFailed,
    Draining,
    InternalFault,
    RouterError,
    StaleConnection,
    UpstreamError,
)
from router.flow.attempts import Attempts, money_cause
from router.flow.board import Board
from router.flow.cache import CacheRules
from router.flow.gate import NotLetIn
from router.flow.hedge import Run, race
from router.flow.ledger import Ledger
from router.flow.observe import Observer, Record
from router.flow.patience import Patience
from router.flow.progress import Progress
from router.flow.relay import together
from router.flow.reuse import Reuse, Wishes
from router.flow.sink import Sink
from router.types import Call, ChatCall, Key, Ladder, Price, Rung

_log = logging.getLogger("rungway")
_NO_WISHES = Wishes()


class Pipeline:
    """Serves calls over the backends of one configuration. `clock` gives monotonic seconds."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        board: Board,
        ledger: Ledger,
        observer: Observer,
        clock: Callable[[], float],
        attempts: Attempts,
        reuse: Reuse,
        cache_rules: CacheRules,
    ) -> None:
        self._reuse = reuse
        self._cache_rules = cache_rules
        self._backends = backends
        self._board = board
        self._ledger = ledger
        self._observer = observer
        self._clock = clock
        self._hedge_budgets: dict[str, RetryBudget] = {}
        self._serving: set[asyncio.Task[object]] = set()
        self._is_ending = False
        self._attempts = attempts
        self.continuity = attempts.continuity

    async def serve(
        self,
        call: Call,
        body_bytes: int,
        sink: Sink,
        record: Record,
        wishes: Wishes = _NO_WISHES,
    ) -> None:
        """Answer one call into the sink. Raises RouterError when nothing was sent.

        What goes wrong after the sink has started ends as an event of the stream, here.
        """
        started = self._clock()
        record.of_call(call)
        admission = self._ledger.admit_at_once(call.key, body_bytes)
        if admission is None:
            admission = await self._ledger.admit(call.key, body_bytes)
        record.admission = admission
        self._observer.in_flight += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            await self._answer(call, sink, record, wishes)
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
            if not admission.is_left:
                # Else its client left while others waited for what this task does.
                self._observer.in_flight -= 1
                self._ledger.leave(admission, call.ladder.name)
            record.total_s = self._clock() - started

    def plan(self, call: Call) -> Plan:
        """Which rungs this call would try now, and why not the others."""
        return ladder.plan(call, self._board.view, self._unable, self._unaffordable)

    async def drain(self, limit_s: float) -> None:
        """Let what is being served end within the limit, then end it: each client hears why."""
        ends_at = self._clock() + limit_s
        # Who leaves meanwhile may leave something behind that is read to its end.
        while under_way := self._serving | self._reuse.draining:
            _, late = await asyncio.wait(under_way, timeout=max(0.0, ends_at - self._clock()))
            if late:
                self._reuse.end()
                break
        self._is_ending = True
        for task in self._serving | self._reuse.draining:
            task.cancel()

    async def _answer(self, call: Call, sink: Sink, record: Record, wishes: Wishes) -> None:
        """Use an answer again, or climb; whatever fails fails as a RouterError."""
        try:
            await self._reuse.serve(call, wishes, self._cache_rules, sink, record, self._climb)
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

    async def _climb(self, call: Call, sink: Sink, record: Record) -> None:
        """Try the plan's rungs in order until one has answered, within the ladder's total time;
        else end with what there is.
        """
        started = self._clock()
        with Patience(f"the call of the ladder {call.ladder.name!r}") as patience:
            patience.wait("total", call.ladder.limits.total_s)
            steps = self.plan(call)
            progress = Progress(call, sink)
            if await self._try_each(steps, progress, sink, record, started):
                return
            if await progress.conclude(record):
                return
            param = "messages" if isinstance(call, ChatCall) else "input"
            raise ladder.no_rung_left(call.ladder.name, steps, param)

    async def _try_each(
        self, steps: Plan, progress: Progress, sink: Sink, record: Record, started: float
    ) -> bool:
        """Whether one of the rungs answered; False: none is left, or none may be asked any more."""
        hedges = _may_hedge(progress.call.ladder)
        for place in range(len(steps)):
            step = steps[place]
            if step.take and record.attempts:
                self._recheck(progress, step)
            has_next = partial(self._has_room, progress, steps, place + 1)
            tries = 0
            while step.take:
                tries += 1
                try:
                    progress.begin(record)
                    if hedges and not record.attempts and has_next():
                        later = steps[place + 1 :]
                        await self._hedge(progress, step, later, sink, record, started)
                    else:
                        await self._attempts.run(progress, step, sink, record, started, has_next)
                    return True
                except NotLetIn as closed:
                    step.take, step.reason = False, closed.reason
                    step.cause, step.wait_s = closed.cause, closed.wait_s
                except UpstreamError as error:
                    if not progress.goes_on(error, record):
                        return False
                    # Not of one that ends the call: it would know the frames that know this step.
                    step.error = error
                    if sink.is_committed:
                        break
                    if not await self._retries(progress, step, error, tries, started, has_next()):
                        break
                    self._recheck(progress, step)
        return False

    async def _hedge(
        self,
        progress: Progress,
        step: Step,
        later: Plan,
        sink: Sink,
        record: Record,
        started: float,
    ) -> None:
        """Ask this rung, and a later one beside it once it is slow."""
        rules = progress.call.ladder
        budget = self._hedging(rules)
        budget.deposit()
        beside = replace(record, attempts=[], usage=None, nanousd=0, first_token_s=None)

        def second() -> Run | None:
            other = next((one for one in later if self._would_take(progress, one)), None)
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
                lambda lane: self._attempts.run(
                    progress, step, lane, record, started, lambda: True
                ),
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
            await self._attempts.run(progress, step, lane, record, started, lambda: True)
        except NotLetIn as closed:
            step.reason, step.cause, step.wait_s = closed.reason, closed.cause, closed.wait_s
            raise
        except UpstreamError as error:
            step.reason, step.cause, step.wait_s = error.message, error.cause, error.retry_after_s
            raise

    def _hedging(self, rules: Ladder) -> RetryBudget:
        budget = self._hedge_budgets.get(rules.name)
        if budget is None:
            settings = RetrySettings(share=rules.limits.hedge_max_share, per_s=0.0)
            budget = self._hedge_budgets[rules.name] = RetryBudget(settings, self._clock())
        return budget

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
            step,
            call,
            self._board.view(call.ladder, step.rung, call.key.priority),
            self._unable,
            self._unaffordable,
        )
        progress.recheck(step, self.continuity)

    def _has_room(self, progress: Progress, steps: Plan, place: int) -> bool:
        """Whether one of the rungs from this place on would take the call at once."""
        return any(self._would_take(progress, steps[at]) for at in range(place, len(steps)))

    def _would_take(self, progress: Progress, step: Step) -> bool:
        if not step.take:
            return False
        now = replace(step)
        self._recheck(progress, now)
        return now.take and self._board.gate(progress.call.ladder, step.rung).has_room()

    def _unable(self, call: Call, rung: Rung) -> str | None:
        return self._backends[rung.backend].unable(call, rung)

    def _unaffordable(self, call: Call, rung: Rung, price: Price | None) -> Unaffordable | None:
        """Why the key cannot pay for this rung, as far as is known before anything is held."""
        key = call.key
        if price is None and not key.allow_unpriced and _has_money_limit(key):
            if self._board.probe_of(rung.backend).state is State.UNKNOWN:
                return Unaffordable("its price was not asked for yet", "state", 1.0)
            words = (
                "its price is unknown, and the key has a money limit (where there are no keys, "
                "it is server.open_usd_per_day): give the rung its usd_per_mtok, or the key "
                "allow_unpriced"
            )
            return Unaffordable(words, "unpriced")
        if isinstance(call, ChatCall):
            tokens = call.needs.prompt_tokens_min
        else:
            tokens = estimate_tokens(call.inputs) // 2
        refused = self._ledger.refusal(key, price, tokens)
        if refused is None:
            return None
        return Unaffordable(refused.message, money_cause(refused), refused.retry_after_s)


def _may_hedge(rules: Ladder) -> bool:
    return rules.limits.hedge_after_s > 0 and not (rules.rescue or rules.escalate_on)


def _join(record: Record, beside: Record, before: int) -> None:
    """Add the second attempt of a hedged call to the call's record."""
    mine = beside.attempts[before + 1 :] if len(beside.attempts) > before else []
    record.attempts += mine
    record.usage = together(record.usage, beside.usage)
    record.nanousd += beside.nanousd
    if beside.rung is not None:
        record.rung, record.status = beside.rung, beside.status
        record.first_token_s = beside.first_token_s


def _has_money_limit(key: Key) -> bool:
    limits = key.limits
    known = (limits.usd_per_day, limits.usd_per_month, key.session_usd)
    return any(limit is not None for limit in known)


def _outcome(error: RouterError) -> str:
    """A short stable word for the metrics and the log."""
    if isinstance(error, UpstreamError):
        return error.cause
    return error.code or error.kind
