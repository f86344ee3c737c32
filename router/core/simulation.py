"""A day of traffic over a ladder, played by events on a heap, with the real policies. Pure, seeded.

Not the pipeline: no sockets and no streams, but the same questions in the same order. A call takes
the first rung whose breaker and limiter let it in at once; else it waits at the first that has room
in its queue; a failed attempt goes to the next rung, and asks the last one again only within its
retry budget. So what the policies do to one another can be measured, and tried out before it runs.

A simulated rung shares its speed among the calls in flight (`Model.speed`): up to `bears` calls it
loses some of its speed for each (`softness`, as a server that batches), beyond it gives all of them
together the same, less what it loses to being overrun (`collapse`). It can be down (refuse at once,
or hang until the attempt's time limit), slow, or fail a share of its calls.

Work is counted in seconds at full speed. All calls on a rung run equally fast, so each of them ends
when the rung's own clock of work done for a single call reaches its mark; that makes a change of
speed one event and not one for each call.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from router.core.breaker import Breaker, BreakerSettings, Permit, State
from router.core.concurrency import AdaptiveLimit, ConcurrencySettings, FixedLimit, Outcome
from router.core.limiter import Limiter, Ticket, Waiter
from router.core.percentiles import Recent
from router.core.retry import RetryBudget, RetrySettings, decide
from router.errors import (
    ConnectFailed,
    UpstreamBusy,
    UpstreamError,
    UpstreamFailed,
    UpstreamTimeout,
)

Random = Callable[[], float]
_DAY_S = 86_400.0
# How soon a refused connection, an error or a busy answer is known.
_REFUSED_S = 0.005
_ERROR_S = 0.1
_OUTCOMES = {UpstreamBusy: Outcome.BUSY, UpstreamTimeout: Outcome.LATE}


@dataclass(frozen=True, slots=True)
class Span:
    """From when to when, and how strong: a factor of speed, or a share of failures."""

    start_s: float
    end_s: float
    strength: float = 0.0


@dataclass(frozen=True, slots=True)
class Model:
    """How a simulated rung behaves, and in which spans otherwise.

    `busy_above`: it answers 429 when more are in flight. `squeezed`: it bears only this share of
    `bears`, as when a neighbour takes the rest.
    """

    name: str
    bears: int = 16
    work_s: float = 4.0
    softness: float = 0.0
    collapse: float = 0.3
    busy_above: int | None = None
    down: tuple[Span, ...] = ()
    hangs: tuple[Span, ...] = ()
    slow: tuple[Span, ...] = ()
    fails: tuple[Span, ...] = ()
    squeezed: tuple[Span, ...] = ()

    def speed(self, in_flight: int, now: float) -> float:
        """Work done a second for each call in flight."""
        load = in_flight / (self.bears * _strength(self.squeezed, now, 1.0))
        alone = 1.0 / (1.0 + self.softness * min(1.0, load))
        excess = max(1.0, load)
        return _strength(self.slow, now, 1.0) * alone / excess / (1 + self.collapse * (excess - 1))

    def serves_per_s(self) -> float:
        """The most calls a second it can serve."""
        return self.bears * self.speed(self.bears, math.inf) / self.work_s


@dataclass(frozen=True, slots=True)
class Traffic:
    """Poisson arrivals; their rate swings over the day by `swing` about its mean, and the logarithm
    of their work has the deviation `spread`.
    """

    mean_per_s: float
    swing: float = 0.0
    day_s: float = _DAY_S
    urgent_share: float = 0.1
    spread: float = 0.8

    def rate(self, now: float) -> float:
        return self.mean_per_s * (1 - self.swing * math.cos(2 * math.pi * now / self.day_s))


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings of the policies, and of the ladder. `fixed`: limits that do not adapt."""

    breaker: BreakerSettings = field(default_factory=BreakerSettings)
    retry: RetrySettings = field(default_factory=RetrySettings)
    concurrency: ConcurrencySettings = field(default_factory=ConcurrencySettings)
    limit_max: int = 256
    fixed: int | None = None
    queue_max: int = 64
    queue_s: float = 5.0
    first_token_s: float = 10.0
    answer_s: float = 60.0
    total_s: float = 120.0


@dataclass(slots=True)
class Tally:
    """What came of a simulated day. `failed` ended in an error, `refused` got no place in time."""

    calls: int = 0
    served: int = 0
    failed: int = 0
    refused: int = 0
    urgent: int = 0
    urgent_served: int = 0
    attempts: int = 0
    retries: int = 0
    retries_allowed: float = 0.0
    firsts: int = 0
    ended_s: float = 0.0
    total_s: Recent = field(default_factory=lambda: Recent(math.inf), compare=False)
    rungs: dict[str, RungTally] = field(default_factory=dict)

    @property
    def served_share(self) -> float:
        return self.served / self.calls if self.calls else 0.0

    @property
    def retry_share(self) -> float:
        return self.retries / self.firsts if self.firsts else 0.0


@dataclass(slots=True)
class RungTally:
    """`probes` are attempts made while half-open, `probed_at` when; `limits` is sampled."""

    attempts: int = 0
    served: int = 0
    retries: int = 0
    firsts: int = 0
    openings: int = 0
    in_flight_max: int = 0
    probed_at: list[float] = field(default_factory=list)
    tried_at: list[float] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Call:
    at: float
    work: float
    priority: int
    tried: set[int] = field(default_factory=set)
    tries: int = 0


@dataclass(slots=True, eq=False)
class _Attempt:
    call: _Call
    rung: int
    ticket: Ticket
    permit: Permit
    is_over: bool = False


class _Rung:
    """One rung's policies, and the simulated backend behind them."""

    def __init__(self, model: Model, rules: Rules) -> None:
        self.model = model
        fixed = rules.fixed
        limit = (
            AdaptiveLimit(rules.concurrency, rules.limit_max)
            if fixed is None
            else FixedLimit(fixed)
        )
        self.limiter = Limiter(limit, rules.queue_max)
        self.breaker = Breaker(rules.breaker)
        self.budget = RetryBudget(rules.retry, 0.0)
        self.tally = RungTally()
        self.waiting: dict[Waiter, _Call] = {}
        self.running: list[tuple[float, int, _Attempt]] = []
        self.count = 0
        self.version = 0
        self._done = 0.0
        self._at = 0.0
        self._speed = 0.0

    def advance(self, now: float) -> None:
        """Work off what was done since the last look, at the speed that held till now."""
        self._done += self._speed * (now - self._at)
        self._at = now

    def start(self, attempt: _Attempt, order: int) -> None:
        heapq.heappush(
            self.running, (self._done + attempt.call.work * self.model.work_s, order, attempt)
        )
        self.count += 1

    def next_end(self, now: float) -> float | None:
        """When the next call ends, if nothing changes before."""
        while self.running and self.running[0][2].is_over:
            heapq.heappop(self.running)
        self._speed = self.model.speed(self.count, now) if self.count else 0.0
        if not self.running:
            return None
        return now + max(0.0, self.running[0][0] - self._done) / self._speed


class Simulation:
    """`rand` gives numbers in [0, 1); the same numbers give the same day."""

    def __init__(
        self, models: Sequence[Model], traffic: Traffic, rules: Rules, rand: Random
    ) -> None:
        self._traffic = traffic
        self._rules = rules
        self._rand = rand
        self._rungs = [_Rung(model, rules) for model in models]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self._now = 0.0
        self.tally = Tally(rungs={rung.model.name: rung.tally for rung in self._rungs})

    def run(self) -> Tally:
        """Play the day, and then let the calls under way end."""
        self._at(0.0, self._arrive)
        for rung in self._rungs:
            for span in (*rung.model.slow, *rung.model.squeezed):
                self._at(span.start_s, lambda rung=rung: self._changed(rung))  # type: ignore[misc]
                self._at(span.end_s, lambda rung=rung: self._changed(rung))  # type: ignore[misc]
        for sample in range(200):
            self._at(self._traffic.day_s * sample / 200, self._sample)
        while self._events:
            self._now, _, act = heapq.heappop(self._events)
            act()
        self.tally.ended_s = self._now
        settings = self._rules.retry
        for tally in (rung.tally for rung in self._rungs):
            self.tally.retries += tally.retries
            self.tally.firsts += tally.firsts
            self.tally.attempts += tally.attempts
            allowed = 1 + settings.share * tally.firsts + settings.per_s * self._now
            self.tally.retries_allowed += allowed
        return self.tally

    # --- arrivals ---------------------------------------------------------------------------------

    def _arrive(self) -> None:
        traffic, now = self._traffic, self._now
        top = traffic.mean_per_s * (1 + traffic.swing)
        # Thinning: candidates at the top rate, each kept with the share that the hour has of it.
        if now > 0 and self._rand() * top < traffic.rate(now):
            urgent = self._rand() < traffic.urgent_share
            call = _Call(now, _lognormal(self._rand, traffic.spread), int(urgent))
            self.tally.calls += 1
            self.tally.urgent += urgent
            self._climb(call)
        later = now - math.log(1 - self._rand()) / top
        if later < traffic.day_s:
            self._at(later, self._arrive)

    def _climb(self, call: _Call, error: UpstreamError | None = None) -> None:
        """Take the first rung with a place, else wait at the first that has room for it."""
        open_rungs = [
            index
            for index, rung in enumerate(self._rungs)
            if index not in call.tried and rung.breaker.may_try(self._now)
        ]
        for index in open_rungs:
            if self._rungs[index].limiter.has_room():
                ticket = self._rungs[index].limiter.enter(self._now, call.priority, 0.0)
                assert isinstance(ticket, Ticket)
                self._attempt(call, index, ticket)
                return
        for index in open_rungs:
            limiter = self._rungs[index].limiter
            # The probe alone may pass a half-open breaker: nobody waits behind it.
            if self._rungs[index].breaker.view(self._now) is not State.CLOSED:
                continue
            if limiter.expected_wait_s(call.priority) <= self._rules.queue_s:
                self._wait(call, index)
                return
        if error is None:
            self.tally.refused += 1
        else:
            self.tally.failed += 1

    def _wait(self, call: _Call, index: int) -> None:
        rung = self._rungs[index]
        waiter = rung.limiter.enter(self._now, call.priority, self._rules.queue_s)
        assert isinstance(waiter, Waiter)
        rung.waiting[waiter] = call
        if waiter.displaced is not None:
            self._turned_away(rung, waiter.displaced)
        self._at(waiter.deadline, lambda: self._expire(rung))

    def _expire(self, rung: _Rung) -> None:
        for waiter in rung.limiter.expire(self._now):
            self._turned_away(rung, waiter)

    def _turned_away(self, rung: _Rung, waiter: Waiter) -> None:
        del rung.waiting[waiter]
        self.tally.refused += 1

    # --- attempts ---------------------------------------------------------------------------------

    def _attempt(self, call: _Call, index: int, ticket: Ticket, *, is_retry: bool = False) -> None:
        rung, now = self._rungs[index], self._now
        is_probe = rung.breaker.view(now) is not State.CLOSED
        permit = rung.breaker.enter(now)
        assert permit is not None, "those who wait are sent on when the breaker opens"
        if is_probe:
            rung.tally.probed_at.append(now)
        if is_retry:
            rung.tally.retries += 1
        else:
            rung.budget.deposit()
            rung.tally.firsts += 1
            call.tries = 0
        call.tries += 1
        rung.tally.attempts += 1
        rung.tally.in_flight_max = max(rung.tally.in_flight_max, rung.limiter.in_flight)
        attempt = _Attempt(call, index, ticket, permit)
        model = rung.model
        if _strength(model.down, now, 0.0):
            rung.tally.tried_at.append(now)
            self._fail_in(_REFUSED_S, attempt, ConnectFailed("refused"))
        elif _strength(model.hangs, now, 0.0):
            rung.tally.tried_at.append(now)
            late = UpstreamTimeout("hangs", phase="first_token")
            self._fail_in(self._rules.first_token_s, attempt, late)
        elif self._rand() < _strength(model.fails, now, 0.0):
            self._fail_in(_ERROR_S, attempt, UpstreamFailed("500"))
        elif model.busy_above is not None and rung.count >= model.busy_above:
            self._fail_in(_REFUSED_S, attempt, UpstreamBusy("429"))
        else:
            self._order += 1
            rung.advance(now)
            rung.start(attempt, self._order)
            self._schedule(rung)
            self._at(now + self._rules.answer_s, lambda: self._too_late(rung, attempt))

    def _fail_in(self, seconds: float, attempt: _Attempt, error: UpstreamError) -> None:
        self._at(self._now + seconds, lambda: self._failed(attempt, error))

    def _too_late(self, rung: _Rung, attempt: _Attempt) -> None:
        if attempt.is_over:
            return
        attempt.is_over = True
        rung.advance(self._now)
        rung.count -= 1
        self._schedule(rung)
        self._failed(attempt, UpstreamTimeout("too slow", phase="answer"))

    def _changed(self, rung: _Rung) -> None:
        rung.advance(self._now)
        self._schedule(rung)

    def _schedule(self, rung: _Rung) -> None:
        rung.version += 1
        version = rung.version
        if (end := rung.next_end(self._now)) is not None:
            self._at(end, lambda: self._ended(rung, version))

    def _ended(self, rung: _Rung, version: int) -> None:
        if version != rung.version:
            return
        rung.advance(self._now)
        _, _, attempt = heapq.heappop(rung.running)
        attempt.is_over = True
        rung.count -= 1
        self._schedule(rung)
        rung.tally.served += 1
        rung.breaker.succeeded(attempt.permit, self._now)
        self._served(attempt.call)
        self._admitted(attempt.rung, rung.limiter.leave(self._now, attempt.ticket, Outcome.SERVED))

    def _served(self, call: _Call) -> None:
        self.tally.served += 1
        self.tally.urgent_served += call.priority
        self.tally.total_s.timed(self._now, self._now - call.at)

    def _failed(self, attempt: _Attempt, error: UpstreamError) -> None:
        rung, call, now = self._rungs[attempt.rung], attempt.call, self._now
        if isinstance(error, UpstreamBusy):
            rung.breaker.cancelled(attempt.permit)
        else:
            before = rung.breaker.view(now)
            rung.breaker.failed(attempt.permit, now, self._rand())
            if before is not State.OPEN and rung.breaker.view(now) is State.OPEN:
                rung.tally.openings += 1
                self._opened(rung)
        outcome = _OUTCOMES.get(type(error), Outcome.OTHER)
        self._admitted(attempt.rung, rung.limiter.leave(now, attempt.ticket, outcome))
        left_s = call.at + self._rules.total_s - now
        if left_s <= 0:
            self.tally.failed += 1
            return
        call.tried.add(attempt.rung)
        has_next = any(
            other.breaker.may_try(now)
            for index, other in enumerate(self._rungs)
            if index not in call.tried
        )
        verdict = decide(
            error,
            tries=call.tries,
            has_next=has_next,
            is_stale_connection=False,
            left_s=left_s,
            settings=self._rules.retry,
            budget=rung.budget,
            now=now,
            rand=self._rand(),
        )
        if verdict.wait_s is None:
            self._climb(call, error)
        else:
            self._at(now + verdict.wait_s, lambda: self._retry(call, attempt.rung))

    def _retry(self, call: _Call, index: int) -> None:
        limiter = self._rungs[index].limiter
        if not (self._rungs[index].breaker.may_try(self._now) and limiter.has_room()):
            self.tally.failed += 1
            return
        ticket = limiter.enter(self._now, call.priority, 0.0)
        assert isinstance(ticket, Ticket)
        self._attempt(call, index, ticket, is_retry=True)

    def _opened(self, rung: _Rung) -> None:
        """Those who wait for a rung that closed look further."""
        waiting, rung.waiting = rung.waiting, {}
        for waiter, call in waiting.items():
            rung.limiter.cancel(self._now, waiter)
            self._climb(call)
        rung.limiter.restart(self._now)

    def _admitted(self, index: int, waiters: list[Waiter]) -> None:
        rung = self._rungs[index]
        for waiter in waiters:
            assert waiter.ticket is not None
            self._attempt(rung.waiting.pop(waiter), index, waiter.ticket)

    # --- the clock --------------------------------------------------------------------------------

    def _at(self, when: float, act: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._events, (when, self._order, act))

    def _sample(self) -> None:
        for rung in self._rungs:
            rung.tally.limits.append(rung.limiter.limit)


def _strength(spans: Sequence[Span], now: float, otherwise: float) -> float:
    for span in spans:
        if span.start_s <= now < span.end_s:
            return span.strength
    return otherwise


def _lognormal(rand: Random, spread: float) -> float:
    """A draw with the mean 1, whose logarithm has this deviation."""
    normal = math.sqrt(-2 * math.log(1 - rand())) * math.cos(2 * math.pi * rand())
    return math.exp(spread * normal - spread**2 / 2)
