"""Looks at every backend now and then, and tells the board. Never on the path of a call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from router.backends.base import Backend, Probe, State
from router.errors import RouterError
from router.flow.board import Board

_log = logging.getLogger("rungway")
_PROBE_LIMIT_S = 15.0


async def probe_forever(
    backends: Iterable[Backend],
    board: Board,
    every_s: float,
    found: Callable[[str, Probe], None],
) -> None:
    """Probe all backends at once, again and again, until cancelled; `found` hears of each."""
    backends = list(backends)
    while True:
        probes = await probe_all(backends, board)
        for backend, probe in zip(backends, probes, strict=True):
            found(backend.name, probe)
        await asyncio.sleep(every_s)


async def probe_all(backends: Iterable[Backend], board: Board) -> list[Probe]:
    return await asyncio.gather(*(probe_one(backend, board) for backend in backends))


async def probe_one(backend: Backend, board: Board) -> Probe:
    try:
        async with asyncio.timeout(_PROBE_LIMIT_S):
            found = await backend.probe()
    except TimeoutError:
        found = Probe(State.DOWN, f"no answer to a probe within {_PROBE_LIMIT_S:g} s")
    except RouterError as error:
        found = Probe(State.DOWN, error.message)
    except Exception:
        # The edge of a background task: one backend's odd answer must not end all probing.
        _log.exception("the probe of %s failed in a way nobody foresaw", backend.name)
        found = Probe(State.DOWN, "its probe failed; the log has the trace")
    if board.probed(backend.name, found):
        _log.info("backend %s is %s%s", backend.name, found.state.value, _because(found))
    return found


def _because(found: Probe) -> str:
    return f": {found.reason}" if found.reason else ""
