"""One rung's state as several workers see it, added up for people. Pure.

A row has plain counts and the buckets of the recent times (`percentiles.Window`), so that the
percentiles of all are those of all calls and not a mean of means. Where workers differ in a rung's
state the worst is shown, since that is what somebody will look for, and `states` counts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from router.core import percentiles
from router.types import Json

# From the best to the worst.
_STATES = ("closed", "asleep", "half_open", "open", "cooling")
_SHARES = (("p50", 0.5), ("p95", 0.95))


def shown(rows: Sequence[Json]) -> Json:
    """What people are shown of one rung, of which each worker gave a row."""
    worst = max(rows, key=lambda row: (_STATES.index(row["state"]), row["until"] or 0.0))
    limits = [row["limit"] for row in rows]
    totals = [row["total"] for row in rows]
    found = {
        "rung": worst["rung"],
        "state": worst["state"],
        "in_flight": sum(row["in_flight"] for row in rows),
        "limit": None if None in limits else sum(limits),
        "queued": sum(row["queued"] for row in rows),
        "first_token_ms": _percentiles([row["first_token"] for row in rows]),
        "total_ms": _percentiles(totals),
        "error_share": percentiles.error_share(totals),
        "until": worst["until"],
        "reason": worst["reason"],
    }
    states = Counter(row["state"] for row in rows)
    return found if len(states) == 1 else {**found, "states": dict(states)}


def ladders(workers: Sequence[Json]) -> Json:
    """The ladders of a status, of each of which every worker gave its rows.

    The first worker's configuration counts: during a reload the others may have another one.
    """
    found: Json = {}
    for name, own in workers[0].items():
        by_rung = {row["rung"]: [row] for row in own}
        for worker in workers[1:]:
            for row in worker.get(name, ()):
                by_rung.get(row["rung"], []).append(row)
        found[name] = {"rungs": [shown(rows) for rows in by_rung.values()]}
    return found


def _percentiles(windows: Sequence[percentiles.Window]) -> Json:
    return {
        name: None
        if (seconds := percentiles.quantile_s(windows, share)) is None
        else round(seconds * 1e3, 1)
        for name, share in _SHARES
    }
