"""Plans: who is left out and why, in which order, and what the caller hears when nobody is left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from router.core.ladder import RungView, Step, ViewOf, explain, no_rung_left, order, plan, recheck
from router.errors import (
    ConnectFailed,
    NoRungLeft,
    PromptTooLong,
    RungRefused,
    UpstreamBusy,
    UpstreamError,
    UpstreamTimeout,
    UpstreamTooLarge,
)
from router.types import Abilities, Call, ChatCall, Key, Ladder, Needs, Policy, Price, Rung, Task

A = Rung("a", "small", Abilities(context=100, tools=False), price=Price(5, 5))
B = Rung("b", "large", Abilities(context=10_000, json_schema=False))
C = Rung("c", "paid", price=Price(1, 2), tiers=frozenset({"premium"}), max_in_flight=2)
LADDER = Ladder("ladder", Task.CHAT, (A, B, C))


NOTHING = Needs()


def rich(call: Call, rung: Rung, price: Price | None) -> None:
    """A key that can pay for everything."""


def seen(views: dict[str, RungView]) -> ViewOf:
    return lambda ladder, rung, priority: views.get(rung.name, RungView())


def call(needs: Needs = NOTHING, tier: str = "", policy: Policy = Policy.ORDER) -> ChatCall:
    return ChatCall(
        id="1",
        key=Key("k", tier=tier),
        ladder=LADDER,
        policy=policy,
        body={},
        stream=False,
        wants_usage=False,
        needs=needs,
    )


def taken(the_call: ChatCall, views: dict[str, RungView] | None = None) -> list[str]:
    steps = plan(the_call, seen(views or {}), lambda call, rung: None, rich)
    assert len(steps) == 3
    return [step.rung.backend for step in steps if step.take]


@pytest.mark.parametrize(
    ("needs", "tier", "expected"),
    [
        (Needs(), "", "ab"),
        (Needs(), "premium", "abc"),
        (Needs(prompt_tokens_min=100), "", "b"),
        (Needs(prompt_tokens_min=99), "", "ab"),
        (Needs(tools=True), "", "b"),
        (Needs(json_schema=True), "", "a"),
        (Needs(vision=True), "premium", "abc"),
        (Needs(prompt_tokens_min=20_000), "premium", "c"),
    ],
)
def test_what_a_rung_cannot_do_is_skipped(needs: Needs, tier: str, expected: str) -> None:
    assert taken(call(needs, tier)) == list(expected)


def test_the_configuration_goes_before_what_the_backend_says() -> None:
    learned = RungView(learned=Abilities(context=5, tools=True, vision=False))
    views = {A.name: learned, B.name: learned}
    assert taken(call(Needs(prompt_tokens_min=50)), views) == ["a", "b"]
    assert taken(call(Needs(tools=True)), views) == ["b"]
    assert taken(call(Needs(vision=True)), views) == []


def test_closed_and_full_rungs_are_skipped_with_their_reason() -> None:
    views = {
        A.name: RungView(closed="closed after: no credit", closed_cause="refused", wait_s=9),
        C.name: RungView(full="its limit of 2 is in flight"),
    }
    steps = plan(call(tier="premium"), seen(views), lambda call, rung: None, rich)
    assert explain("ladder", steps) == {
        "ladder": "ladder",
        "rungs": [
            {"rung": "a/small", "take": False, "reason": "closed after: no credit"},
            {"rung": "b/large", "take": True, "reason": "may be tried"},
            {
                "rung": "c/paid",
                "take": False,
                "reason": "its limit of 2 is in flight",
            },
        ],
    }


def test_what_a_protocol_cannot_carry_is_skipped_with_the_backends_words() -> None:
    steps = plan(call(), seen({}), lambda call, rung: "no tools" if rung is A else None, rich)
    assert (steps[0].take, steps[0].reason) == (False, "no tools")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy.ORDER, "abc"),
        (Policy.BEST, "cba"),
        pytest.param(Policy.CHEAPEST, "cab", id="cheapest: the unknown price last"),
        pytest.param(Policy.FASTEST, "bac", id="fastest: the unmeasured last, in order"),
    ],
)
def test_the_order_follows_the_policy(policy: Policy, expected: str) -> None:
    views = {B.name: RungView(first_token_s=lambda: 0.2)}
    assert [rung.backend for rung in order(call(policy=policy), seen(views))] == list(expected)


def test_a_learned_price_counts_where_the_rung_has_none() -> None:
    dear, cheap = RungView(learned_price=Price(50, 50)), RungView(learned_price=Price(0, 0))
    for view, expected in ((dear, "cab"), (cheap, "bca")):
        views = {B.name: view, A.name: cheap}
        assert [r.backend for r in order(call(policy=Policy.CHEAPEST), seen(views))] == list(
            expected
        )


def steps_of(*errors_or_causes: Any) -> list[Step]:
    steps = []
    for rung, one in zip((A, B, C), errors_or_causes, strict=False):
        if isinstance(one, UpstreamError):
            steps.append(Step(rung, True, "may be tried", error=one))
        else:
            steps.append(Step(rung, False, f"because of {one}", one))
    return steps


LONG = PromptTooLong("too long")
BUSY = UpstreamBusy("busy", retry_after_s=7)
DOWN = ConnectFailed("refused")
SLOW = UpstreamTimeout("slow", phase="first_token")
OURS = RungRefused("401")
LARGE = UpstreamTooLarge("413")


@pytest.mark.parametrize(
    ("steps", "status", "code", "wait_s", "should_retry"),
    [
        (steps_of(LONG, "prompt_too_long"), 400, "context_length_exceeded", None, False),
        (steps_of("tools", "unable"), 400, "unsupported_parameter", None, False),
        (steps_of("tools", LONG), 400, "unsupported_parameter", None, False),
        (steps_of(BUSY, DOWN), 429, "no_rung_left", 7, True),
        (steps_of("busy"), 429, "no_rung_left", 1, True),
        (steps_of(DOWN, SLOW), 504, "no_rung_left", None, False),
        (steps_of(DOWN, LONG), 502, "no_rung_left", None, False),
        (steps_of("tier", "tier"), 403, "model_not_allowed", None, False),
        (steps_of(LARGE, LONG), 413, "request_too_large", None, False),
        (steps_of(OURS, "tier"), 502, "no_rung_left", None, False),
    ],
)
def test_the_answer_when_no_rung_is_left(
    steps: list[Step], status: int, code: str, wait_s: float | None, should_retry: bool | None
) -> None:
    error = no_rung_left("ladder", steps)
    assert isinstance(error, NoRungLeft)
    assert (error.status, error.code, error.retry_after_s) == (status, code, wait_s)
    assert error.should_retry is should_retry
    assert [rung["rung"] for rung in error.rungs] == [step.rung.name for step in steps]
    for step in steps:
        assert (step.error.message if step.error else step.reason) in error.message


@pytest.mark.parametrize(
    ("cause", "status", "code"),
    [
        ("budget", 429, "insufficient_quota"),
        ("in_use", 429, "budget_in_use"),
        ("rate", 429, "rate_limit_exceeded"),
        ("state", 503, "state_unavailable"),
        ("unpriced", 403, "price_unknown"),
    ],
)
def test_want_of_money_says_why_of_each_rung(cause: str, status: int, code: str) -> None:
    error = no_rung_left("ladder", steps_of(cause, "tier"))
    assert (error.status, error.code) == (status, code)
    assert [(rung["rung"], rung["reason"]) for rung in error.rungs] == [
        (A.name, f"because of {cause}"),
        (B.name, "because of tier"),
    ]


def test_a_shorter_wait_of_a_closed_rung_is_told() -> None:
    closed = replace(Step(B, False, "closed", "busy"), wait_s=3.2)
    error = no_rung_left("ladder", [*steps_of(BUSY), closed])
    assert error.retry_after_s == 3.2


def test_a_step_is_asked_again_when_its_turn_comes() -> None:
    steps = plan(call(), seen({}), lambda call, rung: None, rich)
    assert steps[1].take
    view = RungView(closed="closed since", wait_s=3)
    recheck(steps[1], call(), view, lambda call, rung: None, rich)
    assert (steps[1].take, steps[1].reason, steps[1].wait_s) == (False, "closed since", 3)


def test_a_prompt_too_long_names_the_parameter() -> None:
    assert no_rung_left("l", steps_of(LONG)).param == "messages"
    assert no_rung_left("l", steps_of(LONG), "input").param == "input"


def test_a_step_is_judged_once_and_only_when_it_is_looked_at() -> None:
    asked: list[str] = []

    def unable(_: Call, rung: Rung) -> str | None:
        asked.append(rung.name)
        return None

    steps = plan(call(tier="premium"), seen({}), unable, rich)
    assert asked == []
    assert len(steps) == 3
    later = steps[1:]
    assert asked == []
    assert later[0] is steps[1]
    assert asked == [steps[1].rung.name]
    later[0].take = False
    assert [step.take for step in steps] == [True, False, True]
    assert [len(part) for part in (steps[:1], later[1:], steps[9:])] == [1, 1, 0]
    with pytest.raises(IndexError):
        later[2]
    assert sorted(asked) == sorted(step.rung.name for step in steps)
