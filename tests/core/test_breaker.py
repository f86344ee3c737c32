"""The breaker: what opens it, one probe at a time, and how a rung comes back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.core.breaker import Breaker, BreakerSettings, Permit, State

SETTINGS = BreakerSettings(
    failures_in_row_max=3,
    share_max=0.5,
    calls_min=6,
    window_calls=10,
    window_s=60,
    open_s_min=5,
    open_s_max=40,
    probe_s=30,
)


def taken(breaker: Breaker, now: float) -> Permit:
    permit = breaker.enter(now)
    assert permit is not None
    return permit


def play(breaker: Breaker, outcomes: str, now: float = 0.0, rand: float = 0.0) -> None:
    """One attempt after the other: "x" fails, "." succeeds, "-" is left by its caller."""
    for outcome in outcomes:
        permit = taken(breaker, now)
        if outcome == "x":
            breaker.failed(permit, now, rand)
        elif outcome == ".":
            breaker.succeeded(permit, now)
        else:
            breaker.cancelled(permit)


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ("", State.CLOSED),
        ("xx", State.CLOSED),
        ("xxx", State.OPEN),
        ("xx.xx", State.CLOSED),
        pytest.param("xx-x", State.OPEN, id="who leaves breaks no row"),
        pytest.param("--------", State.CLOSED, id="who leaves is no failure"),
        pytest.param("x.x.x", State.CLOSED, id="too few for a share"),
        pytest.param("x.x..x", State.OPEN, id="half of six"),
        pytest.param("..........xx.xx", State.CLOSED, id="four of the last ten"),
        pytest.param("..........xx.xx.x", State.OPEN, id="five of the last ten"),
    ],
)
def test_what_opens_it(outcomes: str, state: State) -> None:
    breaker = Breaker(SETTINGS)
    play(breaker, outcomes)
    assert breaker.view(0) is state
    assert breaker.may_try(0) is (state is State.CLOSED)


def test_old_failures_are_forgotten() -> None:
    breaker = Breaker(SETTINGS)
    play(breaker, "x.x.x", now=0)
    play(breaker, ".x", now=61)
    assert breaker.view(61) is State.CLOSED


@pytest.mark.parametrize(("rand", "until"), [(0.0, 5.0), (0.5, 7.5), (0.75, 8.75)])
def test_the_interval_has_its_jitter(rand: float, until: float) -> None:
    breaker = Breaker(SETTINGS)
    play(breaker, "xxx", rand=rand)
    assert breaker.until(0) == pytest.approx(until)
    assert breaker.enter(until - 0.01) is None
    assert breaker.view(until) is State.HALF_OPEN
    assert breaker.until(until) is None


def test_one_probe_at_a_time_and_its_success_closes() -> None:
    breaker = Breaker(SETTINGS)
    play(breaker, "xxx")
    probe = taken(breaker, 5)
    assert breaker.view(5) is State.HALF_OPEN
    assert breaker.enter(5) is None
    assert breaker.until(5) == 35
    breaker.succeeded(probe, 6)
    assert breaker.view(6) is State.CLOSED
    assert breaker.until(6) is None
    play(breaker, "xx", now=6)
    assert breaker.view(6) is State.CLOSED


def test_failed_probes_double_the_interval_up_to_its_limit() -> None:
    breaker = Breaker(SETTINGS)
    play(breaker, "xxx", rand=1 - 1e-12)
    now, waits = 0.0, []
    for _ in range(5):
        until = breaker.until(now)
        assert until is not None
        waits.append(round(until - now, 6))
        now = until
        breaker.failed(taken(breaker, now), now, 1 - 1e-12)
    assert waits == [10, 20, 40, 40, 40]


@pytest.mark.parametrize(("calm_s", "wait_s"), [(9, 20), (10, 10)])
def test_a_grown_interval_is_forgotten_only_after_a_calm(calm_s: float, wait_s: float) -> None:
    breaker = Breaker(SETTINGS)
    play(breaker, "xxx")
    breaker.succeeded(taken(breaker, 5), 5)
    now = 5.0 + calm_s
    play(breaker, "xxx", now=now, rand=1 - 1e-12)
    assert breaker.until(now) == pytest.approx(now + wait_s)


def test_a_probe_whose_caller_left_makes_way_at_once() -> None:
    breaker = Breaker(SETTINGS)
    play(breaker, "xxx")
    breaker.cancelled(taken(breaker, 5))
    assert breaker.view(5) is State.HALF_OPEN
    assert breaker.until(5) is None
    probe = taken(breaker, 5)
    assert breaker.enter(5) is None
    breaker.failed(probe, 5, 0)
    assert breaker.view(5) is State.OPEN


def test_a_lost_probe_does_not_wedge_it_and_may_still_bring_news() -> None:
    breaker = Breaker(SETTINGS)
    play(breaker, "xxx")
    lost = taken(breaker, 5)
    second = taken(breaker, 35)
    breaker.cancelled(lost)
    assert breaker.enter(35) is None, "the lost one's leaving frees nothing"
    breaker.succeeded(lost, 36)
    assert breaker.view(36) is State.CLOSED
    breaker.failed(second, 36, 0)
    play(breaker, "xx", now=36)
    assert breaker.view(36) is State.CLOSED, "the second probe is of an earlier period"


def test_what_began_before_the_state_changed_says_nothing() -> None:
    breaker = Breaker(SETTINGS)
    early = [taken(breaker, 0) for _ in range(4)]
    play(breaker, "xxx")
    breaker.failed(early[0], 1, 0.9)
    assert breaker.until(1) == 5
    breaker.succeeded(early[1], 2)
    assert breaker.view(2) is State.OPEN
    taken(breaker, 5)
    breaker.succeeded(early[2], 6)
    breaker.cancelled(early[3])
    assert breaker.view(6) is State.HALF_OPEN
    assert breaker.enter(6) is None


def test_a_reset_starts_afresh() -> None:
    breaker = Breaker(SETTINGS)
    play(breaker, "xxx")
    breaker.failed(taken(breaker, 5), 5, 0)
    breaker.reset(6)
    assert breaker.view(6) is State.CLOSED
    play(breaker, "xxx", now=6, rand=1 - 1e-12)
    assert breaker.until(6) == pytest.approx(16)


class Breakers(RuleBasedStateMachine):
    """Any order of events: one probe at a time, and intervals that are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = replace(SETTINGS, failures_in_row_max=2)
        self.breaker = Breaker(self.settings)
        self.now = 0.0
        self.held: list[Permit] = []
        self.probe: Permit | None = None
        self.probe_until = 0.0
        self.opened_at: float | None = None

    @rule(seconds=st.floats(0, 50))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def enter(self) -> None:
        state, may = self.breaker.view(self.now), self.breaker.may_try(self.now)
        permit = self.breaker.enter(self.now)
        assert (permit is not None) is may
        if permit is None:
            assert state is not State.CLOSED
            return
        assert state is not State.OPEN
        assert permit not in self.held
        self.held.append(permit)
        if state is State.HALF_OPEN:
            assert self.probe is None or self.now >= self.probe_until
            self.probe, self.probe_until = permit, self.now + self.settings.probe_s
            if self.opened_at is not None:
                assert self.now - self.opened_at >= self.settings.open_s_min

    @rule(data=st.data(), outcome=st.sampled_from("x.-"), rand=st.floats(0, 1, exclude_max=True))
    def end(self, data: st.DataObject, outcome: str, rand: float) -> None:
        if not self.held:
            return
        permit = data.draw(st.sampled_from(self.held))
        self.held.remove(permit)
        before = self.breaker.view(self.now)
        if outcome == "x":
            self.breaker.failed(permit, self.now, rand)
        elif outcome == ".":
            self.breaker.succeeded(permit, self.now)
        else:
            self.breaker.cancelled(permit)
        after = self.breaker.view(self.now)
        if after is State.OPEN and before is not State.OPEN:
            self.opened_at = self.now
        if after is not State.HALF_OPEN or permit == self.probe:
            self.probe = None

    @invariant()
    def it_never_closes_off_for_longer_than_its_limits(self) -> None:
        until = self.breaker.until(self.now)
        assert (until is None) is self.breaker.may_try(self.now)
        if until is not None:
            longest = max(self.settings.open_s_max, self.settings.probe_s)
            assert self.now < until <= self.now + longest


TestBreakers = Breakers.TestCase


def test_it_follows_another_process_that_opened_and_closed() -> None:
    breaker = Breaker(SETTINGS)
    late = taken(breaker, 0)
    breaker.follow(20.0, 10.0)
    assert (breaker.view(10), breaker.until(10)) == (State.OPEN, 20.0)
    breaker.succeeded(late, 11)
    assert breaker.view(11) is State.OPEN, "what began before says nothing"
    breaker.follow(15.0, 12.0)
    assert breaker.until(12) == 20.0, "the longer of two holds"
    breaker.follow(25.0, 12.0)
    assert breaker.until(12) == 25.0
    breaker.follow(None, 13.0)
    assert (breaker.view(13), breaker.until(13)) == (State.CLOSED, None)


def test_a_success_elsewhere_says_nothing_to_a_closed_one() -> None:
    breaker = Breaker(SETTINGS)
    play(breaker, "xx")
    breaker.follow(None, 1.0)
    play(breaker, "x", now=1.0)
    assert breaker.view(1) is State.OPEN


def test_an_opening_elsewhere_ends_a_probe_here() -> None:
    breaker = Breaker(SETTINGS)
    play(breaker, "xxx")
    probe = taken(breaker, 50)
    breaker.follow(90.0, 51.0)
    breaker.succeeded(probe, 52)
    assert (breaker.view(52), breaker.until(52)) == (State.OPEN, 90.0)
    assert breaker.view(90) is State.HALF_OPEN
