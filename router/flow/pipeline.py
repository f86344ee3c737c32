"""The path of a call, top to bottom: admit, plan, attempt rung after rung, settle, record.

Invariants: before the commit any failure that is the rung's moves to the next one; after it the
answer is completed once or ended by one error event. Every hold is settled exactly once, whatever
happens to the client, the upstream or the task: `settle` does not await.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from router.backends.base import Backend, ChatAttempt, EmbedAttempt, State
from router.core import ladder
from router.core.embeddings import estimate_tokens
from router.core.ladder import Step, Unaffordable
from router.core.retry import RetryBudget, RetrySettings
from router.errors import (
    CallerError,
    ConnectFailed,
    Draining,
    InternalFault,
    QuotaUsedUp,
    RouterError,
    StaleConnection,
    StateUnavailable,
    UpstreamError,
    UpstreamTimeout,
)
from router.flow import relay
from router.flow.board import Board
from router.flow.cache import CacheRules
from router.flow.canaries import Canaries
from router.flow.charge import Charge
from router.flow.continuity import Continuity
from router.flow.embedding import Batches
from router.flow.gate import Gate, NotLetIn, Place, counts
from router.flow.hedge import Run, race
from router.flow.ledger import Ledger
from router.flow.observe import AttemptRecord, Observer, Record
from router.flow.progress import Progress
from router.flow.relay import together
from router.flow.reuse import Reuse, Wishes
from router.flow.sink import Provenance, Sink
from router.types import Call, ChatCall, EmbedCall, Embeddings, Key, Ladder, Price, Rung

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
        answer_bytes_max: int,
        reuse: Reuse,
        batches: Batches,
        cache_rules: CacheRules,
    ) -> None:
        self._reuse = reuse
        self._batches = batches
        self._cache_rules = cache_rules
        self._backends = backends
        self._board = board
        self._ledger = ledger
        self._observer = observer
        self._clock = clock
        self._answer_bytes_max = answer_bytes_max
        self._canaries = Canaries(reuse.cache.drop)
        self._hedge_budgets: dict[str, RetryBudget] = {}
        self._serving: set[asyncio.Task[object]] = set()
        self._is_ending = False
        self.continuity = Continuity(backends, board)

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
            self._observer.in_flight -= 1
            self._ledger.leave(admission, call.ladder.name)
            record.total_s = self._clock() - started

    def plan(self, call: Call) -> list[Step]:
        """Which rungs this call would try now, and why not the others."""
        views = self._board.views(call.ladder, call.key.priority)
        return ladder.plan(call, views, self._unable, self._unaffordable)

    async def drain(self, limit_s: float) -> None:
        """Let what is being served end within the limit, then end it: each client hears why."""
        under_way = self._serving | self._reuse.draining
        if under_way:
            await asyncio.wait(under_way, timeout=limit_s)
        self._is_ending = True
        for task in self._serving | self._reuse.draining:
            task.cancel()

    async def _answer(self, call: Call, sink: Sink, record: Record, wishes: Wishes) -> None:
        """Use an answer again, or climb; whatever fails fails as a RouterError."""
        try:
            await self._reuse.serve(call, wishes, self._cache_rules, sink, record, self._try)
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

    async def _try(self, call: Call, sink: Sink, record: Record) -> None:
        """Climb within the ladder's total time."""
        try:
            async with asyncio.timeout(call.ladder.limits.total_s):
                await self._climb(call, sink, record, self._clock())
        except TimeoutError as error:
            raise self._too_long(call) from error

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
        beside = replace(record, attempts=[], usage=None, nanousd=0, first_token_s=None)

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
        is_retry = any(one.rung.name == rung.name for one in record.attempts)
        if isinstance(call, EmbedCall):
            charge = await self._hold(call, rung, record)
            with _noting(record, rung, sink), _settling(charge, record):
                await self._embed(charge, rung, sink, record, gate, is_retry)
            return
        wait_s = 0.0 if has_next else progress.queue_left_s
        waits_since = self._clock()
        try:
            place = await gate.enter(
                call.key.priority,
                wait_s,
                queue_max=call.ladder.limits.queue_max,
                is_retry=is_retry,
            )
        finally:
            progress.queue_left_s -= self._clock() - waits_since
        with self._in_place(call, rung, gate, place):
            charge = await self._hold(call, rung, record)
            began, is_first = self._clock(), record.first_token_s is None
            with _noting(record, rung, sink), _settling(charge, record):
                await self._relay(progress, charge, rung, sink, record, started, gate, place)
        # What continues another rung's stream began with that one's first token.
        first_s = record.first_token_s if is_first else None
        gate.served(place, None if first_s is None else first_s - (began - started))

    @contextmanager
    def _in_place(self, call: Call, rung: Rung, gate: Gate, place: Place) -> Iterator[None]:
        """What goes wrong in a place on the rung gives it back."""
        try:
            yield
        except UpstreamError as error:
            gate.failed(place, error)
            self._note_failure(call, rung, error)
            raise
        except BaseException:
            gate.left(place)
            raise

    async def _embed(
        self,
        charge: Charge,
        rung: Rung,
        sink: Sink,
        record: Record,
        gate: Gate,
        is_retry: bool,
    ) -> None:
        """One try of one rung for embeddings, in requests that other calls may share.

        A request has a place on the rung, not each call in it.
        """
        call = charge.call
        assert isinstance(call, EmbedCall)
        backend = self._backends[rung.backend]
        limits = call.ladder.limits

        async def put(attempt: EmbedAttempt) -> Embeddings:
            place = await gate.enter(
                call.key.priority,
                limits.queue_s,
                queue_max=limits.queue_max,
                is_retry=is_retry,
            )
            with self._in_place(call, rung, gate, place):
                vectors = await relay.embeddings(backend, attempt, self._canaries)
            gate.served(place, None)
            return vectors

        attempt = EmbedAttempt(call, rung, limits.connect_s, self._answer_bytes_max)
        vectors = await self._batches.embed(
            backend, attempt, charge, put, is_shared=self._cache_rules.is_shared
        )
        provenance = Provenance(rung, len(record.attempts), charge.clamped_to)
        await sink.send_embeddings(vectors, relay.priced(provenance, charge))

    async def _hold(self, call: Call, rung: Rung, record: Record) -> Charge:
        """Set aside what an attempt may cost. Raises NotLetIn where the key cannot pay for it."""
        assert record.admission is not None
        view = self._board.view(call.ladder, rung)
        charge = Charge(
            self._ledger,
            record.admission,
            call,
            rung,
            rung.price or view.learned_price,
            self._board.estimates(rung),
            self._clock,
        )
        try:
            await charge.open(ladder.abilities(rung, view.learned).context)
        except (CallerError, StateUnavailable) as refused:
            raise NotLetIn(refused.message, _money_cause(refused), refused.retry_after_s) from None
        return charge

    async def _relay(
        self,
        progress: Progress,
        charge: Charge,
        rung: Rung,
        sink: Sink,
        record: Record,
        started: float,
        gate: Gate,
        place: Place,
    ) -> None:
        call = charge.call
        backend = self._backends[rung.backend]
        connect_s = call.ladder.limits.connect_s
        provenance = Provenance(rung, len(record.attempts), charge.clamped_to)
        assert isinstance(call, ChatCall)
        chat = ChatAttempt(call, rung, connect_s, self._answer_bytes_max)
        if not call.stream:
            await relay.answer(backend, chat, charge, sink, provenance)
            return

        def speaks() -> float:
            gate.spoke(place)
            return self._clock() - started

        await relay.stream(backend, chat, charge, sink, record, provenance, speaks, progress)

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

    def _unaffordable(self, call: Call, rung: Rung, price: Price | None) -> Unaffordable | None:
        """Why the key cannot pay for this rung, as far as is known before anything is held."""
        key = call.key
        if price is None and not key.allow_unpriced and _has_money_limit(key):
            if self._board.probe_of(rung.backend).state is State.UNKNOWN:
                return Unaffordable("its price was not asked for yet", "state", 1.0)
            words = (
                "its price is unknown, and the key has a money limit: give the rung its "
                "usd_per_mtok, or the key allow_unpriced"
            )
            return Unaffordable(words, "unpriced")
        if isinstance(call, ChatCall):
            tokens = call.needs.prompt_tokens_min
        else:
            tokens = estimate_tokens(call.inputs) // 2
        refused = self._ledger.refusal(key, price, tokens)
        if refused is None:
            return None
        return Unaffordable(refused.message, _money_cause(refused), refused.retry_after_s)

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
    record.nanousd += beside.nanousd
    if beside.rung is not None:
        record.rung, record.status = beside.rung, beside.status
        record.first_token_s = beside.first_token_s


@contextmanager
def _noting(record: Record, rung: Rung, sink: Sink) -> Iterator[None]:
    """Keep a record of one attempt and of how it ended."""
    attempt = AttemptRecord(rung, "failed")
    record.attempts.append(attempt)
    try:
        yield
    except NotLetIn:
        # It had no place in the end, so it was none.
        record.attempts.remove(attempt)
        raise
    except UpstreamError as error:
        attempt.cause = error.cause
        if sink.is_committed:
            record.rung = rung
        raise
    except asyncio.CancelledError:
        attempt.cause = "cancelled"
        raise
    attempt.cause = ""
    record.rung, record.status = rung, 200


@contextmanager
def _settling(charge: Charge, record: Record) -> Iterator[None]:
    """Settle the attempt when it is over, however it ended: exactly once, and without awaiting."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        record.usage = together(record.usage, charge.close(error))
        record.nanousd += charge.nanousd


def _money_cause(refused: RouterError) -> str:
    """The word by which a plan knows why a key cannot pay."""
    if isinstance(refused, StateUnavailable):
        return "state"
    return "budget" if isinstance(refused, QuotaUsedUp) else "rate"


def _has_money_limit(key: Key) -> bool:
    limits = key.limits
    known = (limits.usd_per_day, limits.usd_per_month, key.session_usd)
    return any(limit is not None for limit in known)


def _outcome(error: RouterError) -> str:
    """A short stable word for the metrics and the log."""
    if isinstance(error, UpstreamError):
        return error.cause
    return error.code or error.kind
