"""The board: the live view of every rung. Changed only by synchronous calls on the one loop.

It keeps what a plan needs: what backends said of their models, how they looked when last probed,
which rungs are closed until when and why, and each rung's gate (breaker, places, queue).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from router.backends.base import Probe, State
from router.core import rung_rows
from router.core.estimate import Estimates
from router.core.ladder import RungView
from router.errors import UpstreamBusy, UpstreamError
from router.flow.gate import Gate
from router.types import UNKNOWN_ABILITIES, Json, Ladder, Rung

# A busy rung is left alone for as long as it asks, within reason.
_BUSY_COOL_S_MAX = 60.0
# A burst of calls that fail alike is told to the other workers once.
_TOLD_AGAIN_S = 1.0


@dataclass(slots=True)
class _Closed:
    until: float
    reason: str
    cause: str


@dataclass(slots=True)
class _BackendState:
    probe: Probe = field(default_factory=lambda: Probe(State.UNKNOWN, "not looked at yet"))
    closed: _Closed | None = None


@dataclass(slots=True)
class RungState:
    """One rung's. `estimates` outlive a reload."""

    rung: Rung
    gate: Gate
    estimates: Estimates
    made_with: tuple[int | None, int]
    backend: _BackendState
    closed: _Closed | None = None
    # As long as nothing is wrong, what it shows changes with its backend's probe only.
    seen_by: Probe | None = None
    view: RungView = field(default_factory=RungView)


class Board:
    """`clock` gives monotonic seconds, `rand` numbers from 0 to 1.

    `tell` hears what the boards of other workers should know, to be given to their `hear`.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        rand: Callable[[], float] = random.random,
        tell: Callable[[Json], None] = lambda event: None,
    ) -> None:
        self._clock = clock
        self._rand = rand
        self._tell = tell
        self._rungs: dict[str, RungState] = {}
        self._backends: dict[str, _BackendState] = {}
        self._estimates: dict[str, Estimates] = {}
        self.alarms: dict[str, int] = defaultdict(int)
        self.hedges: dict[str, int] = defaultdict(int)

    def configure(self, ladders: Iterable[Ladder]) -> None:
        """Make the gates of a configuration. Ladders that share a rung share its gate: its places
        are the fewest that one of them allows, its queue the longest. A gate stays as it is unless
        these change.
        """
        rungs: dict[str, Rung] = {}
        places: dict[str, int | None] = {}
        queues: dict[str, int] = {}
        for ladder in ladders:
            for rung in ladder.rungs:
                known = [one for one in (places.get(rung.name), rung.max_in_flight) if one]
                rungs[rung.name] = rung
                places[rung.name] = min(known, default=None)
                queues[rung.name] = max(queues.get(rung.name, 0), ladder.limits.queue_max)
        for name, limit in places.items():
            state = self._rungs.get(name)
            wanted = (limit, queues[name])
            if state is None or state.made_with != wanted:
                gate = Gate(*wanted, self._clock, self._rand, self._tells_of_breaker(name))
                closed = None if state is None else state.closed
                rung = rungs[name]
                estimates = self._estimates.setdefault(name, Estimates())
                backend = self._backend(rung.backend)
                self._rungs[name] = RungState(rung, gate, estimates, wanted, backend, closed)

    def views(self, ladder: Ladder) -> dict[str, RungView]:
        """What is known of each of a ladder's rungs now, by their names."""
        return {rung.name: self.view(ladder, rung) for rung in ladder.rungs}

    def view(self, ladder: Ladder, rung: Rung, priority: int = 0) -> RungView:
        """What the plan of a call of this priority may know of one rung now."""
        state = self.rung(ladder, rung)
        backend = state.backend
        if state.seen_by is not backend.probe:
            self._look_again(state)
        if state.closed is None and backend.closed is None and state.gate.is_open:
            return state.view
        return self._narrowed(ladder, state, priority)

    def rung(self, ladder: Ladder, rung: Rung) -> RungState:
        state = self._rungs.get(rung.name)
        if state is None:
            self.configure((ladder,))
            state = self._rungs[rung.name]
        return state

    def gate(self, ladder: Ladder, rung: Rung) -> Gate:
        return self.rung(ladder, rung).gate

    def probed(self, backend: str, probe: Probe) -> bool:
        """Note a probe; whether the backend's state changed by it."""
        state = self._backend(backend)
        changed = state.probe.state is not probe.state
        state.probe = probe
        return changed

    def probe_of(self, backend: str) -> Probe:
        return self._backend(backend).probe

    def failed(
        self, ladder: Ladder, rung: Rung, error: UpstreamError, *, own_token: bool
    ) -> str | None:
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
        is_whole = error.closes == "backend"
        state = self._backend(rung.backend) if is_whole else self.rung(ladder, rung)
        until, before = self._clock() + cool_s, state.closed
        state.closed = _Closed(until, reason, error.cause)
        if before is None or before.until + _TOLD_AGAIN_S < until:
            where = {"backend": rung.backend} if is_whole else {"rung": rung.name}
            self._tell({**where, "cool_s": cool_s, "reason": reason, "cause": error.cause})
        return reason

    def hear(self, event: Json) -> None:
        """What another worker's board told; a rung of another configuration is passed over."""
        if "open_s" in event:
            if (rung := self._rungs.get(event["rung"])) is not None:
                rung.gate.follow(event["open_s"])
            return
        state: RungState | _BackendState | None
        if "backend" in event:
            state = self._backend(event["backend"])
        else:
            state = self._rungs.get(event["rung"])
        until = self._clock() + event["cool_s"]
        if state is not None and (state.closed is None or state.closed.until < until):
            state.closed = _Closed(until, event["reason"], event["cause"])

    def reopen(self, backend: str | None = None) -> None:
        """Forget what closed the rungs of this backend, or of all: its token or rules are new."""
        for name, state in self._backends.items():
            if backend in (None, name):
                state.closed = None
        for rung, rung_state in self._rungs.items():
            if backend is None or rung.startswith(f"{backend}/"):
                rung_state.closed = None
                rung_state.gate.reset()

    def is_ready(self, ladder: Ladder) -> bool:
        """Whether some rung of the ladder can be expected to answer."""
        now = self._clock()
        return any(
            self._closed(ladder, rung, now) is None
            and self._backend(rung.backend).probe.state is not State.DOWN
            for rung in ladder.rungs
        )

    def snapshot(self, ladder: Ladder) -> list[Json]:
        """The board for people: one row a rung."""
        return [rung_rows.shown([row]) for row in self.rows(ladder)]

    def rows(self, ladder: Ladder) -> list[Json]:
        """The same as numbers that add up with those of other workers."""
        now = self._clock()
        return [self._row(ladder, rung, now) for rung in ladder.rungs]

    def _row(self, ladder: Ladder, rung: Rung, now: float) -> Json:
        closed, gate = self._closed(ladder, rung, now), self.gate(ladder, rung)
        probe = self._backend(rung.backend).probe
        row = {"rung": rung.name, **gate.row()}
        if closed is not None:
            until, reason = closed.until - now, closed.reason
            row["state"] = "cooling"
        elif (shut := gate.closed()) is not None:
            reason, until = shut
        else:
            if probe.state in (State.ASLEEP, State.STARTING):
                row["state"] = "asleep"
            return {**row, "until": None, "reason": probe.reason or None}
        return {**row, "until": round(until, 1), "reason": reason}

    def _look_again(self, state: RungState) -> None:
        """Its backend was probed."""
        model, probe = state.rung.model, state.backend.probe
        state.seen_by = probe
        state.view = RungView(
            learned=probe.models.get(model, UNKNOWN_ABILITIES),
            first_token_s=state.gate.first_token_s,
            learned_price=probe.prices.get(model),
        )

    def _narrowed(self, ladder: Ladder, state: RungState, priority: int) -> RungView:
        """The view of a rung that may be closed, or full."""
        now, gate, view = self._clock(), state.gate, state.view
        closed = self._closed(ladder, state.rung, now)
        if (full := gate.full(priority, ladder.limits.queue_max)) is not None:
            view = replace(view, full=full)
        if closed is not None:
            return replace(
                view, closed=closed.reason, closed_cause=closed.cause, wait_s=closed.until - now
            )
        if (shut := gate.closed()) is not None:
            return replace(view, closed=shut[0], closed_cause="breaker", wait_s=shut[1])
        return view

    def _tells_of_breaker(self, rung: str) -> Callable[[float | None], None]:
        return lambda open_s: self._tell({"rung": rung, "open_s": open_s})

    def _closed(self, ladder: Ladder, rung: Rung, now: float) -> _Closed | None:
        for state in (self.rung(ladder, rung), self._backend(rung.backend)):
            if state.closed is not None:
                if state.closed.until > now:
                    return state.closed
                state.closed = None
        return None

    def _backend(self, name: str) -> _BackendState:
        state = self._backends.get(name)
        if state is None:
            state = self._backends[name] = _BackendState()
        return state
