"""Plans: which rungs a call may try, in order, and why each other one is left out. Pure.

A plan is a function of the call, its ladder, the key and what the board shows at this moment; it
decides nothing that an attempt could find out at no cost. `no_rung_left` turns a plan in which
every rung was skipped or failed into the one answer that tells the caller what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from router.errors import (
    BUDGET_IN_USE,
    NoRungLeft,
    QuotaUsedUp,
    RateLimited,
    RouterError,
    StateUnavailable,
    UpstreamError,
)
from router.types import UNKNOWN_ABILITIES, Abilities, Call, Json, Ladder, Policy, Price, Rung


def _untimed() -> float | None:
    """No stream was timed."""
    return None


@dataclass(frozen=True, slots=True)
class RungView:
    """What the board shows of a rung now. `closed`: why it may not be tried, for `wait_s` more.

    `first_token_s` is asked only where speed decides.
    """

    learned: Abilities = UNKNOWN_ABILITIES
    closed: str | None = None
    closed_cause: str = "closed"
    wait_s: float | None = None
    full: str | None = None
    first_token_s: Callable[[], float | None] = _untimed
    learned_price: Price | None = None


class Unaffordable(NamedTuple):
    """Why the key cannot pay for a rung: `cause` is budget (used up), rate, unpriced or state."""

    reason: str
    cause: str
    wait_s: float | None = None


# Of a ladder's rung, to a call of this priority.
ViewOf = Callable[[Ladder, Rung, int], RungView]
Unable = Callable[[Call, Rung], str | None]
Affords = Callable[[Call, Rung, Price | None], Unaffordable | None]


@dataclass(slots=True)
class Step:
    """One rung of a plan. `error` is what its attempt ended with, where it was tried and failed.

    `price` and `context` are the rung's, as far as they are known, where it may be tried.
    """

    rung: Rung
    take: bool
    reason: str
    cause: str = ""
    wait_s: float | None = None
    price: Price | None = None
    context: int | None = None
    error: UpstreamError | None = None


class Plan(Sequence[Step]):
    """The steps of a call. Each is judged when somebody first looks at it: of many rungs a call
    mostly needs one. A slice shares its steps with the whole.
    """

    __slots__ = ("_call", "_places", "_rungs", "_steps", "_unable", "_unaffordable", "_view_of")

    def __init__(
        self,
        call: Call,
        rungs: Sequence[Rung],
        view_of: ViewOf,
        unable: Unable,
        unaffordable: Affords,
    ) -> None:
        self._call = call
        self._rungs = rungs
        self._view_of = view_of
        self._unable = unable
        self._unaffordable = unaffordable
        self._places = range(len(rungs))
        self._steps: dict[int, Step] = {}

    @overload
    def __getitem__(self, place: int) -> Step: ...

    @overload
    def __getitem__(self, place: slice) -> Plan: ...

    def __getitem__(self, place: int | slice) -> Step | Plan:
        if isinstance(place, slice):
            part = Plan(self._call, self._rungs, self._view_of, self._unable, self._unaffordable)
            part._places, part._steps = self._places[place], self._steps
            return part
        at = self._places[place]
        step = self._steps.get(at)
        if step is None:
            call, rung = self._call, self._rungs[at]
            view = self._view_of(call.ladder, rung, call.key.priority)
            step = _step(call, rung, view, self._unable, self._unaffordable)
            self._steps[at] = step
        return step

    def __len__(self) -> int:
        return len(self._places)


# Why a rung is left out that no waiting changes.
_FOR_GOOD = frozenset(
    {"tier", "unable", "tools", "vision", "json_schema", "prompt_too_long", "too_large", "unpriced"}
)
# Why a rung is left out that depends on the limits of the call's key.
_OF_THE_KEY = frozenset({"budget", "in_use", "rate", "state", "unpriced"})


def plan(call: Call, view_of: ViewOf, unable: Unable, unaffordable: Affords) -> Plan:
    """The steps for this call, those to take in the order to take them, with every reason.

    `view_of` asks the board, `unable` the rung's backend whether its protocol can carry the call,
    `unaffordable` the ledger whether the key can pay for it.
    """
    rungs: Sequence[Rung] = call.ladder.rungs
    if call.policy is not Policy.ORDER:
        rungs = order(call, view_of)
    return Plan(call, rungs, view_of, unable, unaffordable)


def recheck(step: Step, call: Call, view: RungView, unable: Unable, unaffordable: Affords) -> None:
    """Ask again for a step whose turn comes after an attempt: the plan may be seconds old."""
    now = _step(call, step.rung, view, unable, unaffordable)
    step.take, step.reason, step.cause, step.wait_s = now.take, now.reason, now.cause, now.wait_s
    step.price, step.context = now.price, now.context


def order(call: Call, view_of: ViewOf) -> Sequence[Rung]:
    """The rungs by policy; what is not known sorts last, ties keep the ladder's order."""
    rungs, policy = call.ladder.rungs, call.policy
    if policy is Policy.ORDER:
        return rungs
    if policy is Policy.BEST:
        return rungs[::-1]

    def viewed(rung: Rung) -> RungView:
        return view_of(call.ladder, rung, call.key.priority)

    if policy is Policy.CHEAPEST:
        return sorted(rungs, key=lambda rung: _price(rung, viewed(rung)))
    return sorted(rungs, key=lambda rung: _speed(viewed(rung)))


def abilities(rung: Rung, learned: Abilities) -> Abilities:
    """What the configuration says, completed by what the backend said of itself."""
    own = rung.abilities
    if learned is UNKNOWN_ABILITIES:
        return own
    return Abilities(
        context=own.context if own.context is not None else learned.context,
        tools=own.tools if own.tools is not None else learned.tools,
        vision=own.vision if own.vision is not None else learned.vision,
        json_schema=own.json_schema if own.json_schema is not None else learned.json_schema,
    )


def explain(ladder: str, steps: Sequence[Step]) -> Json:
    """The plan as people and `explain` see it."""
    return {"ladder": ladder, "rungs": describe(steps)}


def describe(steps: Sequence[Step]) -> list[Json]:
    return [
        {
            "rung": step.rung.name,
            "take": step.take,
            "reason": step.error.message if step.error is not None else step.reason,
        }
        for step in steps
    ]


def no_rung_left(ladder: str, steps: Sequence[Step], prompt_param: str = "messages") -> RouterError:
    """The error for a call that no rung answered."""
    error = _no_rung_left(ladder, steps, prompt_param)
    error.lacks_money = any(step.cause in _OF_THE_KEY for step in steps)
    error.rungs = describe(steps)
    return error


def _no_rung_left(ladder: str, steps: Sequence[Step], prompt_param: str) -> RouterError:
    """If every rung gives the same reason, that is the answer's: a prompt too long for all is 400
    `context_length_exceeded`. Else room that comes back is 429 with the shortest wait, a time limit
    504, and the rest 502.
    """
    causes = {_cause(step) for step in steps}
    words = "; ".join(f"{rung['rung']}: {rung['reason']}" for rung in describe(steps))
    message = f"no rung of the ladder {ladder!r} can answer: {words}"
    if causes <= {"prompt_too_long"}:
        return NoRungLeft(
            message,
            status=400,
            kind="invalid_request_error",
            code="context_length_exceeded",
            param=prompt_param,
        )
    if causes <= {"tier"}:
        return NoRungLeft(
            message,
            status=403,
            kind="invalid_request_error",
            code="model_not_allowed",
            param="model",
        )
    if causes <= {"too_large", "prompt_too_long"}:
        return NoRungLeft(
            message,
            status=413,
            kind="invalid_request_error",
            code="request_too_large",
        )
    if causes <= {"tools", "vision", "json_schema", "unable", "prompt_too_long"}:
        return NoRungLeft(
            message,
            status=400,
            kind="invalid_request_error",
            code="unsupported_parameter",
        )
    if (refused := _unpaid(causes, message, steps)) is not None:
        return refused
    if "busy" in causes:
        waits = [wait for step in steps if (wait := _wait(step)) is not None]
        return NoRungLeft(
            message,
            status=429,
            kind="rate_limit_error",
            code="no_rung_left",
            retry_after_s=max(1.0, min(waits, default=1.0)),
        )
    if any(cause.startswith("timeout") for cause in causes):
        return NoRungLeft(message, status=504)
    waits = [step.wait_s for step in steps if step.wait_s is not None]
    return NoRungLeft(message, status=502, retry_after_s=min(waits, default=None))


def _unpaid(causes: set[str], message: str, steps: Sequence[Step]) -> RouterError | None:
    """The answer where money, or a count of tokens, is all that is missing."""
    money = causes - _FOR_GOOD
    if not money <= _OF_THE_KEY or not (money or "unpriced" in causes):
        return None
    waits = [wait for step in steps if step.cause in money and (wait := _wait(step)) is not None]
    wait_s = max(1.0, min(waits)) if waits else None
    if "state" in money:
        return StateUnavailable(message, retry_after_s=wait_s)
    if "rate" in money:
        return RateLimited(message, retry_after_s=wait_s)
    if "in_use" in money:
        return RateLimited(message, code=BUDGET_IN_USE, retry_after_s=wait_s)
    if "budget" in money:
        return QuotaUsedUp(message, retry_after_s=wait_s)
    return NoRungLeft(
        message,
        status=403,
        kind="invalid_request_error",
        code="price_unknown",
        param="model",
    )


def _step(call: Call, rung: Rung, view: RungView, unable: Unable, unaffordable: Affords) -> Step:
    needs = call.needs
    if rung.tiers and call.key.tier not in rung.tiers:
        return Step(rung, False, f"only for the tiers {_list(rung.tiers)}", "tier")
    if (reason := unable(call, rung)) is not None:
        return Step(rung, False, reason, "unable")
    if needs.tools or needs.vision or needs.json_schema:
        able = abilities(rung, view.learned)
        if needs.tools and able.tools is False:
            return Step(rung, False, "the model has no tools", "tools")
        if needs.vision and able.vision is False:
            return Step(rung, False, "the model takes no images", "vision")
        if needs.json_schema and able.json_schema is False:
            return Step(rung, False, "the model keeps to no JSON schema", "json_schema")
    context = rung.abilities.context
    if context is None:
        context = view.learned.context
    if context is not None and needs.prompt_tokens_min >= context:
        reason = f"the prompt has at least {needs.prompt_tokens_min} tokens, the context {context}"
        return Step(rung, False, reason, "prompt_too_long")
    price = rung.price if rung.price is not None else view.learned_price
    if (refused := unaffordable(call, rung, price)) is not None:
        return Step(rung, False, refused.reason, refused.cause, refused.wait_s)
    if view.closed is not None:
        return Step(rung, False, view.closed, view.closed_cause, view.wait_s)
    if view.full is not None:
        return Step(rung, False, view.full, "busy")
    return Step(rung, True, "may be tried", "", None, price, context)


def _cause(step: Step) -> str:
    return step.error.cause if step.error is not None else step.cause


def _wait(step: Step) -> float | None:
    return step.error.retry_after_s if step.error is not None else step.wait_s


def _price(rung: Rung, view: RungView) -> tuple[bool, float]:
    price = rung.price if rung.price is not None else view.learned_price
    if price is None:
        return True, 0.0
    return False, price.input_picousd + price.output_picousd


def _speed(view: RungView) -> tuple[bool, float]:
    first_token_s = view.first_token_s()
    return first_token_s is None, first_token_s or 0.0


def _list(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))
