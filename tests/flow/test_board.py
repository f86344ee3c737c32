"""The board: what closes a rung or its backend, for how long, and for whom."""

from __future__ import annotations

import pytest

from router.backends.base import Probe, State
from router.errors import RungRefused, UpstreamBusy, UpstreamFailed
from router.flow.board import Board
from router.types import Abilities, Json, Ladder, Price, Rung, Task
from tests.fakes.clock import Clock

A, B = Rung("hf", "a"), Rung("hf", "b")
OTHER = Rung("gpu", "m")
ALL = Ladder("all", Task.CHAT, (A, B, OTHER))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> Board:
    return Board(clock)


def closed(board: Board) -> list[str]:
    return [name for name, view in board.views(ALL).items() if view.closed]


def test_a_busy_rung_is_left_alone_for_as_long_as_it_asks(board: Board, clock: Clock) -> None:
    board.failed(ALL, A, UpstreamBusy("busy", retry_after_s=7), own_token=False)
    view = board.views(ALL)[A.name]
    assert closed(board) == ["hf/a"]
    assert view.closed_cause == "busy"
    assert view.wait_s == 7
    clock.now += 7
    assert closed(board) == []


def test_an_unreasonable_wait_is_not_taken_whole(board: Board) -> None:
    board.failed(ALL, A, UpstreamBusy("busy", retry_after_s=86_400), own_token=False)
    wait_s = board.views(ALL)[A.name].wait_s
    assert wait_s == 60


def test_no_credit_closes_the_whole_backend(board: Board, clock: Clock) -> None:
    board.failed(ALL, A, RungRefused("402", cool_s=600, closes="backend"), own_token=False)
    assert closed(board) == ["hf/a", "hf/b"]
    clock.now += 601
    assert closed(board) == []


def test_a_keys_own_token_closes_nothing_for_the_others(board: Board) -> None:
    board.failed(ALL, A, RungRefused("401", cool_s=60), own_token=True)
    assert closed(board) == []


def test_a_failure_without_cool_down_closes_nothing(board: Board) -> None:
    board.failed(ALL, A, UpstreamFailed("500"), own_token=False)
    assert closed(board) == []


def test_abilities_come_from_the_last_probe(board: Board) -> None:
    assert board.views(ALL)[A.name].learned == Abilities()
    found = Probe(State.UP, models={"a": Abilities(context=5)})
    assert board.probed("hf", found) is True
    assert board.probed("hf", found) is False
    assert board.views(ALL)[A.name].learned.context == 5
    assert board.views(ALL)[B.name].learned.context is None


def test_prices_come_from_the_last_probe(board: Board) -> None:
    assert board.views(ALL)[A.name].learned_price is None
    board.probed("hf", Probe(State.UP, prices={"a": Price(1, 2)}))
    views = board.views(ALL)
    assert views[A.name].learned_price == Price(1, 2)
    assert views[B.name].learned_price is None


def test_ready_is_a_rung_that_is_neither_closed_nor_down(board: Board) -> None:
    ladder = Ladder("l", Task.CHAT, (A, OTHER))
    assert board.is_ready(ladder)
    board.probed("hf", Probe(State.DOWN))
    assert board.is_ready(ladder)
    board.failed(ALL, OTHER, UpstreamBusy("busy", retry_after_s=5), own_token=False)
    assert not board.is_ready(ladder)


async def test_the_board_is_shown_as_it_is(board: Board, clock: Clock) -> None:
    gate = board.gate(ALL, A)
    served, failed, held = [await gate.enter(0, 0.0) for _ in range(3)]
    clock.now += 2
    gate.served(served, 0.5)
    gate.failed(failed, UpstreamFailed("500"))
    row = board.snapshot(ALL)[0]
    assert row["first_token_ms"]["p50"] == pytest.approx(500, rel=0.05)
    assert row["total_ms"]["p95"] == pytest.approx(2000, rel=0.05)
    assert (row["rung"], row["state"], row["in_flight"]) == ("hf/a", "closed", 1)
    assert (row["limit"], row["queued"], row["error_share"]) == (None, 0, 0.5)
    assert row["reason"] == "not looked at yet"
    assert board.views(ALL)[A.name].first_token_s() == pytest.approx(0.5, rel=0.05)
    gate.left(held)
    for _ in range(4):
        gate.failed(await gate.enter(0, 0.0), UpstreamFailed("500"))
    row = board.snapshot(ALL)[0]
    assert row["state"] == "open"
    assert row["until"] > 0
    assert "breaker" in row["reason"]
    board.failed(ALL, B, UpstreamBusy("busy", retry_after_s=5), own_token=False)
    assert board.snapshot(ALL)[1]["state"] == "cooling"
    board.probed("gpu", Probe(State.ASLEEP, "scaled to zero"))
    assert board.snapshot(ALL)[2]["state"] == "asleep"


def test_what_a_closed_rung_says_has_none_of_the_upstreams_words(board: Board) -> None:
    refused = RungRefused("alice's secret prompt is not supported", cool_s=5)
    refused.upstream_status = 400
    assert board.failed(ALL, A, refused, own_token=False) == "closed for 5 s after: refused (400)"
    assert "secret" not in str(dict(board.views(ALL))) + str(board.snapshot(ALL))


def test_a_new_token_or_configuration_opens_what_was_closed(board: Board) -> None:
    board.failed(ALL, A, RungRefused("402", cool_s=600, closes="backend"), own_token=False)
    board.failed(ALL, OTHER, RungRefused("401", cool_s=60), own_token=False)
    board.reopen("gpu")
    assert closed(board) == ["hf/a", "hf/b"]
    board.reopen()
    assert closed(board) == []


async def test_what_one_worker_learns_the_others_know(clock: Clock) -> None:
    told: list[Json] = []
    ours, theirs = Board(clock, lambda: 0.0, told.append), Board(clock)
    for board in (ours, theirs):
        board.configure((ALL,))
    ours.failed(ALL, A, UpstreamBusy("busy", retry_after_s=9), own_token=False)
    ours.failed(ALL, A, UpstreamBusy("busy", retry_after_s=9), own_token=False)
    ours.failed(ALL, OTHER, RungRefused("402", cool_s=60, closes="backend"), own_token=False)
    assert len(told) == 2, "the same is told once"
    for event in told:
        theirs.hear(event)
    theirs.hear({**told[0], "rung": "of/another"})
    assert closed(theirs) == ["hf/a", "gpu/m"]
    assert theirs.views(ALL)[A.name].wait_s == 9
    theirs.hear({**told[0], "cool_s": 1})
    assert theirs.views(ALL)[A.name].wait_s == 9, "the longer holds"


async def test_a_breaker_opens_and_closes_in_every_worker(clock: Clock) -> None:
    told: list[Json] = []
    ours, theirs = Board(clock, lambda: 0.0, told.append), Board(clock)
    for board in (ours, theirs):
        board.configure((ALL,))
    gate = ours.gate(ALL, A)
    for _ in range(5):
        gate.failed(await gate.enter(0, 0.0), UpstreamFailed("500"))
    assert told == [{"rung": "hf/a", "open_s": 5.0}]
    theirs.hear(told.pop())
    theirs.hear({"rung": "of/another", "open_s": 5.0})
    assert closed(theirs) == ["hf/a"]
    clock.now += 5
    assert (closed(ours), closed(theirs)) == ([], ["hf/a"]), "who opened it probes it"
    gate.failed(await gate.enter(0, 0.0), UpstreamFailed("500"))
    assert told.pop() == {"rung": "hf/a", "open_s": 5.0}, "a probe that failed is told too"
    clock.now += 5
    gate.served(await gate.enter(0, 0.0), None)
    assert told.pop() == {"rung": "hf/a", "open_s": None}
    theirs.hear({"rung": "hf/a", "open_s": None})
    assert closed(theirs) == []
