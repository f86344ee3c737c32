"""A short day of each trouble: what callers get, what a sick rung bears, and what its limit finds.

The same scenarios as `python -m bench.simulate`, smaller.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest

from bench.simulate import best_fixed, play, scenarios, sweeps, with_fixed
from router.core.breaker import BreakerSettings
from router.core.simulation import Model, Rules, Simulation, Span, Tally, Traffic

_SHORT_DAY_S = 3_600.0
SCENARIOS = {scenario.name: scenario for scenario in scenarios(_SHORT_DAY_S)}
SWEEPS = {scenario.name: scenario for scenario in sweeps(3_600.0)}


@cache
def played(name: str) -> Tally:
    return play(SCENARIOS[name])


def test_the_same_seed_gives_the_same_day() -> None:
    scenario = SCENARIOS["near is down 1 minute in 5"]
    assert play(scenario, seed=7) == play(scenario, seed=7) != play(scenario, seed=8)


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_call_ends_once(name: str) -> None:
    tally = played(name)
    assert tally.calls > 1_000
    assert tally.calls == tally.served + tally.failed + tally.refused
    assert tally.served == sum(rung.served for rung in tally.rungs.values())
    assert tally.attempts == tally.firsts + tally.retries


@pytest.mark.parametrize("name", SCENARIOS)
def test_retries_keep_to_their_budget(name: str) -> None:
    tally = played(name)
    assert tally.retries <= tally.retries_allowed
    settings = SCENARIOS[name].rules.retry
    for rung in tally.rungs.values():
        earned = settings.share * rung.firsts + settings.per_s * tally.ended_s
        assert rung.retries <= 1 + earned


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_rung_in_trouble_gets_at_most_one_probe_an_interval(name: str) -> None:
    scenario, tally = SCENARIOS[name], played(name)
    for model in scenario.models:
        rung = tally.rungs[model.name]
        for span in (*model.down, *model.hangs):
            probes = [at for at in rung.probed_at if span.start_s <= at < span.end_s]
            gaps = [later - at for at, later in pairwise(probes)]
            assert all(gap >= BreakerSettings().open_s_min for gap in gaps)
            # Beside the probes only what it took to see that the rung is dead.
            tried = sum(span.start_s <= at < span.end_s for at in rung.tried_at)
            under_way = scenario.rules.concurrency.limit_first * 3
            assert tried - len(probes) <= BreakerSettings().failures_in_row_max + under_way


@pytest.mark.parametrize(
    ("name", "served_min"),
    [
        ("all is well", 0.999),
        ("near is down for a quarter", 0.999),
        ("near hangs for a quarter", 0.999),
        ("near is down 1 minute in 5", 0.999),
        ("near fails 30 % of calls", 0.999),
        ("near at a quarter of its speed", 0.98),
        ("near alone, fails 10 %", 0.95),
    ],
)
def test_a_sick_rung_costs_callers_next_to_nothing(name: str, served_min: float) -> None:
    assert played(name).served_share >= served_min


def test_retries_serve_calls_that_would_fail() -> None:
    scenario = SCENARIOS["near alone, fails 10 %"]
    none = replace(scenario.rules.retry, share=0.0, per_s=0.0, reserve_max=0.0)
    without = play(replace(scenario, rules=replace(scenario.rules, retry=none)))
    assert without.retries == 0
    assert played(scenario.name).failed < without.failed / 3


def test_when_all_are_down_calls_fail_fast_and_all_come_back() -> None:
    scenario = SCENARIOS["all are down for an hour"]
    (outage,) = scenario.models[0].down
    tally = played(scenario.name)
    lost = tally.failed + tally.refused
    # Those of the outage itself, and of the wait for the probe after it.
    longest_s = outage.end_s - outage.start_s + BreakerSettings().open_s_max
    assert lost <= longest_s * scenario.traffic.rate(outage.start_s) * 1.2
    assert tally.attempts <= tally.calls * 1.05


def test_who_is_urgent_is_served_before_others() -> None:
    tally = played("near alone, half as much again")
    others = (tally.served - tally.urgent_served) / (tally.calls - tally.urgent)
    assert tally.urgent_served / tally.urgent > 0.95 > 0.6 > others


def test_an_overrun_rung_keeps_its_goodput_and_nobody_waits_past_the_limits() -> None:
    scenario = SCENARIOS["near alone, half as much again"]
    tally = played(scenario.name)
    possible = scenario.models[0].serves_per_s() * scenario.traffic.day_s
    assert tally.served >= 0.85 * possible
    longest_s = tally.total_s.quantile_s(tally.ended_s, 1.0)
    assert longest_s is not None
    assert longest_s <= (scenario.rules.queue_s + scenario.rules.answer_s) * 1.05


@pytest.mark.parametrize(
    ("name", "hours", "share_min"),
    [
        ("hard knee, brittle", 1, 0.9),
        ("429 above 20", 1, 0.9),
        ("small", 1, 0.75),
        # A gentle slope takes longer to climb: in the first hour it may still be at 0.7.
        ("batches (soft knee)", 4, 0.9),
    ],
)
def test_the_limit_that_adapts_comes_close_to_the_best_fixed_one(
    name: str, hours: int, share_min: float
) -> None:
    """From a cold start; `bench.simulate` finds the best fixed one by trying."""
    (scenario,) = (scenario for scenario in sweeps(3_600.0 * hours) if scenario.name == name)
    best = replace(scenario.rules, fixed=scenario.models[0].bears)
    assert play(scenario).served >= share_min * play(replace(scenario, rules=best)).served


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_trouble_of_every_kind_at_once_loses_no_call(seed: int) -> None:
    """Queues that overflow, calls out of time, a breaker that opens on those who wait behind it."""
    spans = tuple(Span(start, start + 30, 1) for start in range(60, 1_200, 120))
    sick = Model("near", bears=2, busy_above=4, fails=(Span(0, 1_200, 0.3),), down=spans)
    slow = Model("far", bears=1, work_s=12, hangs=(Span(300, 330, 1),))
    rules = Rules(queue_max=2, queue_s=4, answer_s=15, total_s=18, limit_max=6)
    day = Traffic(3.0, swing=0.9, day_s=1_200, urgent_share=0.3)
    for models in ((sick,), (sick, slow)):
        tally = Simulation(models, day, rules, random.Random(seed).random).run()
        assert tally.calls == tally.served + tally.failed + tally.refused > 2_000
        assert 0 < tally.retries <= tally.retries_allowed
        assert all(1 <= min(rung.limits) <= max(rung.limits) <= 6 for rung in tally.rungs.values())


def test_the_table_finds_the_best_of_the_fixed_limits() -> None:
    fixed = with_fixed(SWEEPS["small"])
    tallies = [play(one) for one in fixed]
    served, limit = best_fixed(fixed, tallies)
    assert served == max(tally.served for tally in tallies)
    assert limit == 3


def test_a_wrong_fixed_limit_costs_far_more() -> None:
    scenario = SWEEPS["hard knee, brittle"]
    wrong = play(replace(scenario, rules=replace(scenario.rules, fixed=40)))
    assert play(scenario).served > 1.3 * wrong.served


@pytest.mark.parametrize(
    ("in_flight", "now", "speed"),
    [
        (1, 0, 1 / 1.1),
        (10, 0, 1 / 2),
        (20, 0, 1 / 2 / 2 / 1.5),
        (10, 15, 1 / 2 / 2 / 1.5),
        (5, 25, 1 / 1.5 / 4),
    ],
)
def test_the_model_of_a_rung(in_flight: int, now: float, speed: float) -> None:
    model = Model(
        "m",
        bears=10,
        work_s=2,
        softness=1,
        collapse=0.5,
        squeezed=(Span(10, 20, 0.5),),
        slow=(Span(20, 30, 0.25),),
    )
    assert model.speed(in_flight, now) == pytest.approx(speed)
    assert model.serves_per_s() == pytest.approx(2.5)


def test_a_day_without_calls_is_no_trouble() -> None:
    day = Traffic(0.001, day_s=1)
    tally = Simulation([Model("m")], day, Rules(), random.Random(1).random).run()
    assert (tally.calls, tally.served_share, tally.retry_share) == (0, 0.0, 0.0)
