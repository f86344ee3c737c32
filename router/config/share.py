"""One worker's share of a configuration: what limits the daemon as a whole is divided. Pure.

The shares of all workers add up to the limit exactly, but nobody's is less than one: a limit lower
than the number of workers is passed by as much, and `checks.warn_of_shares` says so. Which limits:
a rung's places, a ladder's queues, the client connections, the cache's memory.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from router.config.model import Config
from router.types import Ladder


def share_of(config: Config, index: int, workers: int) -> Config:
    """The configuration as worker `index`, from 0, is to keep it."""
    connections = share(config.server.max_connections, index, workers)
    ladders = {name: _ladder(ladder, index, workers) for name, ladder in config.ladders.items()}
    server = msgspec.structs.replace(config.server, max_connections=connections)
    memory = share(config.cache.memory_mib, index, workers)
    cache = msgspec.structs.replace(config.cache, memory_mib=memory)
    return replace(config, server=server, ladders=ladders, cache=cache)


def share(limit: int, index: int, workers: int) -> int:
    """At least one of what there is at all; the first workers take what cannot be divided."""
    return max(min(limit, 1), limit // workers + (index < limit % workers))


def _ladder(ladder: Ladder, index: int, workers: int) -> Ladder:
    rungs = tuple(
        rung
        if rung.max_in_flight is None
        else replace(rung, max_in_flight=share(rung.max_in_flight, index, workers))
        for rung in ladder.rungs
    )
    queue_max = share(ladder.limits.queue_max, index, workers)
    return replace(ladder, rungs=rungs, limits=replace(ladder.limits, queue_max=queue_max))
