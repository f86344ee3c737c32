"""The board: the live view of every rung. Changed only by synchronous calls on the one loop.

It keeps what a plan needs: what backends said of their models, how they looked when last probed,
which rungs are closed until when and why, how many calls are in flight, and how fast answers began.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from router.backends.base import Probe, State
from router.core.ladder import RungView
from router.errors import UpstreamBusy, UpstreamError
from router.types import UNKNOWN_ABILITIES, Abilities, Json, Ladder, Rung

# How much a new reading moves the running mean of the time to the first token.
_EWMA_WEIGHT = 0.2
# A busy rung is left alone for as long as it asks, within reason.
_BUSY_COOL_S_MAX = 60.0
# Percentiles and error shares have their place in the status, and no measurement yet.
_NOT_MEASURED = {"p50": None, "p95": None}


@dataclass(slots=True)
class _Closed:
    until: float
    reason: str
    cause: str


@dataclass(slots=True)
class _RungState:
    in_flight: int = 0
    first_token_s: float | None = None
    closed: _Closed | None = None


@dataclass(slots=True)
class _BackendState:
    probe: Probe = field(default_factory=lambda: Probe(State.UNKNOWN, "not looked at yet"))
    closed: _Closed | None = None


class Board:
    """`clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._rungs: dict[str, _RungState] = {}
        self._backends: dict[str, _BackendState] = {}
        self.alarms: dict[str, int] = defaultdict(int)

    def views(self, rungs: Iterable[Rung]) -> dict[str, RungView]:
        """What the plan may know of these rungs now."""
        now = self._clock()
        return {rung.name: self._view(rung, now) for rung in rungs}

    def probed(self, backend: str, probe: Probe) -> bool:
        """Note a probe; whether the backend's state changed by it."""
        state = self._backend(backend)
        changed = state.probe.state is not probe.state
        state.probe = probe
        return changed

    def probe_of(self, backend: str) -> Probe:
        return self._backend(backend).probe

    def began(self, rung: Rung) -> None:
        self._rung(rung).in_flight += 1

    def ended(self, rung: Rung) -> None:
        self._rung(rung).in_flight -= 1

    def answered(self, rung: Rung, first_token_s: float) -> None:
        """An attempt brought its first content after so many seconds."""
        state = self._rung(rung)
        before = state.first_token_s
        state.first_token_s = (
            first_token_s if before is None else before + _EWMA_WEIGHT * (first_token_s - before)
        )

    def failed(self, rung: Rung, error: UpstreamError, *, own_token: bool) -> str | None:
        """An attempt failed; why the rung is closed now, or None where it stays open.

        A refusal of a key's own token says nothing to the other keys.
        """
        cool_s = error.cool_s
        if isinstance(error, UpstreamBusy) and cool_s is None and error.retry_after_s:
            cool_s = min(error.retry_after_s, _BUSY_COOL_S_MAX)
        if cool_s is None or (own_token and error.cause == "refused"):
            return None
        # Other callers read this, so it has none of the upstream's words: they may be a prompt's.
        status = f" ({error.upstream_status})" if error.upstream_status else ""
        reason = f"closed for {cool_s:g} s after: {error.cause}{status}"
        closed = _Closed(self._clock() + cool_s, reason, error.cause)
        if error.closes == "backend":
            self._backend(rung.backend).closed = closed
        else:
            self._rung(rung).closed = closed
        return reason

    def reopen(self, backend: str | None = None) -> None:
        """Forget what closed the rungs of this backend, or of all: its token or rules are new."""
        for name, state in self._backends.items():
            if backend in (None, name):
                state.closed = None
        for rung, rung_state in self._rungs.items():
            if backend is None or rung.startswith(f"{backend}/"):
                rung_state.closed = None

    def view(self, rung: Rung) -> RungView:
        """What the plan may know of one rung now."""
        return self._view(rung, self._clock())

    def is_ready(self, ladder: Ladder) -> bool:
        """Whether some rung of the ladder can be expected to answer."""
        now = self._clock()
        return any(
            self._closed(rung, now) is None
            and self._backend(rung.backend).probe.state is not State.DOWN
            for rung in ladder.rungs
        )

    def snapshot(self, rungs: Iterable[Rung]) -> list[Json]:
        """The board for people: one row a rung."""
        now = self._clock()
        rows: list[Json] = []
        for rung in rungs:
            closed, state = self._closed(rung, now), self._rung(rung)
            probe = self._backend(rung.backend).probe
            rows.append(
                {
                    "rung": rung.name,
                    "state": "cooling" if closed else _shown(probe.state),
                    "in_flight": state.in_flight,
                    "limit": rung.max_in_flight,
                    "queued": 0,
                    "first_token_ms": dict(_NOT_MEASURED),
                    "total_ms": dict(_NOT_MEASURED),
                    "error_share": None,
                    "until": round(closed.until - now, 1) if closed else None,
                    "reason": closed.reason if closed else probe.reason or None,
                }
            )
        return rows

    def _view(self, rung: Rung, now: float) -> RungView:
        state, closed = self._rung(rung), self._closed(rung, now)
        return RungView(
            learned=self._learned(rung),
            closed=closed.reason if closed else None,
            closed_cause=closed.cause if closed else "",
            wait_s=closed.until - now if closed else None,
            in_flight=state.in_flight,
            first_token_s=state.first_token_s,
            learned_price=self._backend(rung.backend).probe.prices.get(rung.model),
        )

    def _learned(self, rung: Rung) -> Abilities:
        return self._backend(rung.backend).probe.models.get(rung.model, UNKNOWN_ABILITIES)

    def _closed(self, rung: Rung, now: float) -> _Closed | None:
        for state in (self._rung(rung), self._backend(rung.backend)):
            if state.closed is not None:
                if state.closed.until > now:
                    return state.closed
                state.closed = None
        return None

    def _rung(self, rung: Rung) -> _RungState:
        state = self._rungs.get(rung.name)
        if state is None:
            state = self._rungs[rung.name] = _RungState()
        return state

    def _backend(self, name: str) -> _BackendState:
        state = self._backends.get(name)
        if state is None:
            state = self._backends[name] = _BackendState()
        return state


def _shown(state: State) -> str:
    return "asleep" if state in (State.ASLEEP, State.STARTING) else "closed"
