"""`python -m bench.simulate`: a day of traffic over ladders in trouble, and what comes of it.

No sockets: `router.core.simulation` plays the day by events, with the daemon's own breaker, limiter
and retry budget. The first table asks what callers get and what a sick rung must bear; the second
compares the limit that adapts with the best of several fixed ones, under traffic of one rate. The
seeds are fixed: the same code prints the same numbers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise

from router.core.simulation import Model, Rules, Simulation, Span, Tally, Traffic

_DAY_S = 86_400.0
_SWEEP_S = 14_400.0
_FIXED = (0.85, 1.0, 1.15, 1.5)


@dataclass(frozen=True)
class Scenario:
    """A ladder, its traffic, and what is wrong that day."""

    name: str
    models: tuple[Model, ...]
    traffic: Traffic
    rules: Rules = field(default_factory=Rules)


def scenarios(day_s: float = _DAY_S) -> list[Scenario]:
    """The troubles, each at the same part of a day of any length."""

    def span(start: float, end: float, strength: float = 1.0) -> Span:
        return Span(start * day_s, end * day_s, strength)

    # At the peak of the day the near rung has more to do than it bears.
    near = Model("near", bears=8, work_s=4, collapse=0.5)
    far = Model("far", bears=64, work_s=2, collapse=0.3)
    noon = (span(0.4, 0.65),)
    flaps = tuple(Span(start, start + 60, 1) for start in range(0, int(day_s), 300))
    hour = (span(0.5, 0.54),)
    troubles: list[tuple[str, tuple[Model, ...], float]] = [
        ("all is well", (near, far), 1.5),
        ("near is down for a quarter", (replace(near, down=noon), far), 1.5),
        ("near hangs for a quarter", (replace(near, hangs=noon), far), 1.5),
        ("near is down 1 minute in 5", (replace(near, down=flaps), far), 1.5),
        ("near fails 30 % of calls", (replace(near, fails=(span(0, 2, 0.3),)), far), 1.5),
        (
            "near at a quarter of its speed",
            (replace(near, slow=(span(0.4, 0.65, 0.25),)), far),
            1.5,
        ),
        ("near alone, fails 10 %", (replace(near, fails=(span(0, 2, 0.1),)),), 1.0),
        ("near alone, fails 40 %", (replace(near, fails=(span(0, 2, 0.4),)),), 1.0),
        ("near alone, half as much again", (near,), 3.0),
        ("all are down for an hour", (replace(near, down=hour), replace(far, down=hour)), 1.5),
    ]
    return [
        Scenario(name, models, Traffic(per_s, swing=0.6, day_s=day_s))
        for name, models, per_s in troubles
    ]


def sweeps(day_s: float = _SWEEP_S) -> list[Scenario]:
    """One rung with more to do than it bears, most of the day: which limit serves most?"""
    squeezed = (Span(day_s / 3, day_s * 2 / 3, 0.4),)
    models = [
        Model("hard knee, collapses slowly", bears=16, collapse=0.3),
        Model("hard knee, brittle", bears=16, collapse=1.5),
        Model("hard knee, no collapse", bears=16, collapse=0.0),
        Model("batches (soft knee)", bears=32, softness=2, collapse=0.3),
        Model("batches, large", bears=48, softness=1, collapse=0.3),
        Model("429 above 20", bears=16, busy_above=20),
        Model("small", bears=3, collapse=0.5),
        Model("squeezed to 40 % for a third", bears=32, collapse=0.5, squeezed=squeezed),
    ]
    return [
        Scenario(model.name, (model,), Traffic(1.3 * model.serves_per_s(), 0.5, day_s))
        for model in models
    ]


def play(scenario: Scenario, seed: int = 1) -> Tally:
    rand = random.Random(seed).random
    return Simulation(scenario.models, scenario.traffic, scenario.rules, rand).run()


def with_fixed(scenario: Scenario) -> list[Scenario]:
    """The same with fixed limits about what the rung bears."""
    bears = scenario.models[0].bears
    limits = sorted({max(1, round(bears * factor)) for factor in _FIXED})
    return [replace(scenario, rules=replace(scenario.rules, fixed=limit)) for limit in limits]


def best_fixed(scenarios_tried: Sequence[Scenario], tallies: Sequence[Tally]) -> tuple[int, int]:
    """The most calls served by one of them, and its limit."""
    served, limit = max(
        (tally.served, scenario.rules.fixed or 0)
        for scenario, tally in zip(scenarios_tried, tallies, strict=True)
    )
    return served, limit


def _print_ladders(tallies: Sequence[Tally]) -> None:
    print(
        f"A day of {_DAY_S / 3600:g} hours. Retries and what the budget allows are shares of first"
        " attempts;\nprobes are those sent to a near rung that was down or hung, in all and at the"
        " least seconds apart.\n"
    )
    heads = "calls,served,failed,refused,attempts,retries,allowed,openings,probes,apart,p50 s,p95 s"
    print(f"{'':32}" + "".join(f"{head:>9}" for head in heads.split(",")))
    for scenario, tally in zip(scenarios(), tallies, strict=True):
        near = tally.rungs["near"]
        dead = (*scenario.models[0].down, *scenario.models[0].hangs)
        probes = [at for at in near.probed_at if any(s.start_s <= at < s.end_s for s in dead)]
        apart = min((b - a for a, b in pairwise(probes)), default=None)
        now = tally.ended_s
        cells = (
            f"{tally.calls}",
            f"{tally.served / tally.calls:.2%}",
            f"{tally.failed / tally.calls:.2%}",
            f"{tally.refused / tally.calls:.2%}",
            f"{tally.attempts / tally.calls:.3f}",
            f"{tally.retries / tally.firsts:.2%}",
            f"{tally.retries_allowed / tally.firsts:.2%}",
            f"{near.openings}",
            f"{len(probes)}",
            "" if apart is None else f"{apart:.1f}",
            f"{tally.total_s.quantile_s(now, 0.5):.1f}",
            f"{tally.total_s.quantile_s(now, 0.95):.1f}",
        )
        print(f"{scenario.name:32}" + "".join(f"{cell:>9}" for cell in cells))


def _print_sweeps(rows: Sequence[tuple[Scenario, list[Scenario], list[Tally]]]) -> None:
    print(
        f"\n{_SWEEP_S / 3600:g} hours of 0.65 to 1.95 times what the rung serves, from a cold"
        " start. Goodput: calls served.\n"
    )
    heads = ("calls", "adaptive", "fixed", "its limit", "share", "limits")
    print(f"{'':32}" + "".join(f"{head:>10}" for head in heads))
    for scenario, fixed, (adaptive, *tallies) in rows:
        served, limit = best_fixed(fixed, tallies)
        limits = sorted(adaptive.rungs[scenario.name].limits)
        tenth = len(limits) // 10
        cells = (
            f"{adaptive.calls}",
            f"{adaptive.served}",
            f"{served}",
            f"{limit}",
            f"{adaptive.served / served:.1%}",
            f"{limits[tenth]}-{limits[-tenth - 1]}",
        )
        print(f"{scenario.name:32}" + "".join(f"{cell:>10}" for cell in cells))


def main() -> None:
    with ProcessPoolExecutor() as pool:
        _print_ladders(list(pool.map(play, scenarios())))
        rows = [(scenario, with_fixed(scenario)) for scenario in sweeps()]
        played = pool.map(play, [one for scenario, fixed in rows for one in (scenario, *fixed)])
        _print_sweeps(
            [
                (scenario, fixed, [next(played) for _ in range(1 + len(fixed))])
                for scenario, fixed in rows
            ]
        )


if __name__ == "__main__":
    main()
