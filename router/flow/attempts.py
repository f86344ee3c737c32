"""One try of one rung: a place at its gate, a hold, the answer relayed, everything settled.

The pipeline says which rung is tried and what becomes of a failure; how a try goes is here. It
raises NotLetIn where the rung was never asked, and UpstreamError where it failed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType

from router.backends.base import Backend, ChatAttempt, EmbedAttempt
from router.core.ladder import Step
from router.errors import (
    BUDGET_IN_USE,
    CallerError,
    QuotaUsedUp,
    RouterError,
    StateUnavailable,
    UpstreamError,
)
from router.flow import relay
from router.flow.batcher import Tab
from router.flow.board import Board
from router.flow.canaries import Canaries
from router.flow.charge import Charge
from router.flow.continuity import Continuity
from router.flow.embedding import Batches
from router.flow.gate import Gate, NotLetIn, Place, counts
from router.flow.ledger import Ledger
from router.flow.observe import AttemptRecord, Record
from router.flow.progress import Progress
from router.flow.relay import together
from router.flow.sink import Provenance, Sink
from router.types import Call, ChatCall, EmbedCall, Embeddings, Rung

_log = logging.getLogger("rungway")


class Attempts:
    """Tries the rungs of one configuration. `clock` gives monotonic seconds; `drop` forgets what a
    rung has answered, when its canaries show another model."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        board: Board,
        ledger: Ledger,
        clock: Callable[[], float],
        answer_bytes_max: int,
        batches: Batches,
        drop: Callable[[str], None],
        *,
        shares_texts: bool,
    ) -> None:
        self._backends = backends
        self._board = board
        self._ledger = ledger
        self._clock = clock
        self._answer_bytes_max = answer_bytes_max
        self._batches = batches
        self._shares_texts = shares_texts
        self._canaries = Canaries(drop)
        self.continuity = Continuity(backends, board)

    async def run(
        self,
        progress: Progress,
        step: Step,
        sink: Sink,
        record: Record,
        started: float,
        has_next: Callable[[], bool],
    ) -> None:
        """Nobody waits for a place on a rung while a later one has room (`has_next`)."""
        call, rung = progress.call, step.rung
        state = self._board.rung(call.ladder, rung)
        gate = state.gate
        is_retry = bool(record.attempts) and any(
            one.rung.name == rung.name for one in record.attempts
        )
        assert record.admission is not None
        charge = Charge(
            self._ledger,
            record.admission,
            call,
            rung,
            step.price,
            state.estimates,
            self._clock,
        )
        if isinstance(call, EmbedCall):
            if not charge.open_at_once(step.context):
                await self._open(charge, step)
            with _Turn(charge, record, rung, sink):
                await self._embed(charge, rung, sink, record, gate, is_retry)
            return
        place = gate.try_enter(is_retry=is_retry)
        if place is None:
            place = await self._wait(progress, gate, has_next, is_retry=is_retry)
        try:
            if not charge.open_at_once(step.context):
                await self._open(charge, step)
            is_first = record.first_token_s is None
            with _Turn(charge, record, rung, sink):
                await self._relay(progress, charge, rung, sink, record, started, gate, place)
        except BaseException as error:
            self._give_back(call, rung, gate, place, error)
            raise
        first_s = record.first_token_s
        if first_s is not None:
            # What continues another rung's stream began with that one's first token.
            first_s = first_s - (charge.opened_at - started) if is_first else None
        gate.served(place, first_s)

    async def _wait(
        self, progress: Progress, gate: Gate, has_next: Callable[[], bool], *, is_retry: bool
    ) -> Place:
        """Wait for a place, where no later rung has room. Raises NotLetIn."""
        call = progress.call
        waits_since = self._clock()
        try:
            return await gate.enter(
                call.key.priority,
                0.0 if has_next() else progress.queue_left_s,
                queue_max=call.ladder.limits.queue_max,
                is_retry=is_retry,
            )
        finally:
            progress.queue_left_s -= self._clock() - waits_since

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
            place = gate.try_enter(is_retry=is_retry)
            if place is None:
                place = await gate.enter(
                    call.key.priority,
                    limits.queue_s,
                    queue_max=limits.queue_max,
                    is_retry=is_retry,
                )
            try:
                vectors = await relay.embeddings(backend, attempt, self._canaries)
            except BaseException as error:
                self._give_back(call, rung, gate, place, error)
                raise
            gate.served(place, None)
            return vectors

        attempt = EmbedAttempt(call, rung, limits.connect_s, self._answer_bytes_max)
        tab = Tab()
        try:
            vectors = await self._batches.embed(
                backend, attempt, charge.nanousd_of, put, tab, is_shared=self._shares_texts
            )
        finally:
            # Also where it failed, or was left.
            if tab.tokens or tab.nanousd:
                charge.used(tab.usage, tab.nanousd)
        cost = charge.call_nanousd(charge.usage)
        await sink.send_embeddings(
            vectors, Provenance(rung, len(record.attempts), charge.clamped_to, cost)
        )

    async def _open(self, charge: Charge, step: Step) -> None:
        """Set aside what an attempt may cost. Raises NotLetIn where the key cannot pay for it."""
        try:
            await charge.open(step.context)
        except (CallerError, StateUnavailable) as refused:
            raise NotLetIn(refused.message, money_cause(refused), refused.retry_after_s) from None

    def _relay(
        self,
        progress: Progress,
        charge: Charge,
        rung: Rung,
        sink: Sink,
        record: Record,
        started: float,
        gate: Gate,
        place: Place,
    ) -> Awaitable[None]:
        call = charge.call
        backend = self._backends[rung.backend]
        connect_s = call.ladder.limits.connect_s
        assert isinstance(call, ChatCall)
        chat = ChatAttempt(call, rung, connect_s, self._answer_bytes_max)
        attempts = len(record.attempts)
        if not call.stream:
            return relay.answer(backend, chat, charge, sink, attempts)
        provenance = Provenance(rung, attempts, charge.clamped_to, is_short=charge.is_short)

        def speaks() -> float:
            gate.spoke(place)
            return self._clock() - started

        return relay.stream(backend, chat, charge, sink, record, provenance, speaks, progress)

    def _give_back(
        self, call: Call, rung: Rung, gate: Gate, place: Place, error: BaseException
    ) -> None:
        """What went wrong in a place on the rung gives it back."""
        if not isinstance(error, UpstreamError):
            gate.left(place)
            return
        gate.failed(place, error)
        self._note_failure(call, rung, error)

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


class _Turn:
    """A try under way: settled when it is over, exactly once and without awaiting, and written
    down with how it ended.
    """

    __slots__ = ("_attempt", "_charge", "_record", "_sink")

    def __init__(self, charge: Charge, record: Record, rung: Rung, sink: Sink) -> None:
        self._charge = charge
        self._record = record
        self._sink = sink
        self._attempt = AttemptRecord(rung, "failed")

    def __enter__(self) -> None:
        self._record.attempts.append(self._attempt)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        charge, record, attempt = self._charge, self._record, self._attempt
        used = charge.close(error)
        record.usage = used if record.usage is None else together(record.usage, used)
        record.nanousd += charge.nanousd
        if error is None:
            attempt.cause = ""
            record.rung, record.status = attempt.rung, 200
        elif isinstance(error, NotLetIn):
            # It had no place in the end, so it was none.
            record.attempts.remove(attempt)
        elif isinstance(error, UpstreamError):
            attempt.cause = error.cause
            if self._sink.is_committed:
                record.rung = attempt.rung
        elif isinstance(error, asyncio.CancelledError):
            attempt.cause = "cancelled"


def money_cause(refused: RouterError) -> str:
    """The word by which a plan knows why a key cannot pay."""
    if isinstance(refused, StateUnavailable):
        return "state"
    if isinstance(refused, QuotaUsedUp):
        return "budget"
    return "in_use" if refused.code == BUDGET_IN_USE else "rate"
