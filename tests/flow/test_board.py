"""The board: what closes a rung or its backend, for how long, and for whom."""

from __future__ import annotations

import pytest

from router.backends.base import Probe, State
from router.errors import RungRefused, UpstreamBusy, UpstreamFailed
from router.flow.board import Board
from router.types import Abilities, Ladder, Price, Rung, Task

A, B = Rung("hf", "a"), Rung("hf", "b")
OTHER = Rung("gpu", "m")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> Board:
    return Board(clock)


def closed(board: Board) -> list[str]:
    return [name for name, view in board.views((A, B, OTHER)).items() if view.closed]


def test_a_busy_rung_is_left_alone_for_as_long_as_it_asks(board: Board, clock: Clock) -> None:
    board.failed(A, UpstreamBusy("busy", retry_after_s=7), own_token=False)
    view = board.views((A,))[A.name]
    assert closed(board) == ["hf/a"]
    assert view.closed_cause == "busy"
    assert view.wait_s == 7
    clock.now += 7
    assert closed(board) == []


def test_an_unreasonable_wait_is_not_taken_whole(board: Board) -> None:
    board.failed(A, UpstreamBusy("busy", retry_after_s=86_400), own_token=False)
    wait_s = board.views((A,))[A.name].wait_s
    assert wait_s == 60


def test_no_credit_closes_the_whole_backend(board: Board, clock: Clock) -> None:
    board.failed(A, RungRefused("402", cool_s=600, closes="backend"), own_token=False)
    assert closed(board) == ["hf/a", "hf/b"]
    clock.now += 601
    assert closed(board) == []


def test_a_keys_own_token_closes_nothing_for_the_others(board: Board) -> None:
    board.failed(A, RungRefused("401", cool_s=60), own_token=True)
    assert closed(board) == []


def test_a_failure_without_cool_down_closes_nothing(board: Board) -> None:
    board.failed(A, UpstreamFailed("500"), own_token=False)
    assert closed(board) == []


def test_abilities_come_from_the_last_probe(board: Board) -> None:
    assert board.views((A,))[A.name].learned == Abilities()
    found = Probe(State.UP, models={"a": Abilities(context=5)})
    assert board.probed("hf", found) is True
    assert board.probed("hf", found) is False
    assert board.views((A, B))[A.name].learned.context == 5
    assert board.views((A, B))[B.name].learned.context is None


def test_prices_come_from_the_last_probe(board: Board) -> None:
    assert board.views((A,))[A.name].learned_price is None
    board.probed("hf", Probe(State.UP, prices={"a": Price(1, 2)}))
    views = board.views((A, B))
    assert views[A.name].learned_price == Price(1, 2)
    assert views[B.name].learned_price is None


def test_ready_is_a_rung_that_is_neither_closed_nor_down(board: Board) -> None:
    ladder = Ladder("l", Task.CHAT, (A, OTHER))
    assert board.is_ready(ladder)
    board.probed("hf", Probe(State.DOWN))
    assert board.is_ready(ladder)
    board.failed(OTHER, UpstreamBusy("busy", retry_after_s=5), own_token=False)
    assert not board.is_ready(ladder)


def test_the_first_token_is_a_running_mean(board: Board) -> None:
    board.answered(A, 1.0)
    board.answered(A, 2.0)
    assert board.views((A,))[A.name].first_token_s == pytest.approx(1.2)


def test_in_flight_is_counted(board: Board) -> None:
    board.began(A)
    board.began(A)
    board.ended(A)
    assert board.views((A,))[A.name].in_flight == 1
    assert board.snapshot((A,)) == [
        {
            "rung": "hf/a",
            "state": "closed",
            "in_flight": 1,
            "limit": None,
            "queued": 0,
            "first_token_ms": {"p50": None, "p95": None},
            "total_ms": {"p50": None, "p95": None},
            "error_share": None,
            "until": None,
            "reason": "not looked at yet",
        }
    ]


def test_what_a_closed_rung_says_has_none_of_the_upstreams_words(board: Board) -> None:
    refused = RungRefused("alice's secret prompt is not supported", cool_s=5)
    refused.upstream_status = 400
    assert board.failed(A, refused, own_token=False) == "closed for 5 s after: refused (400)"
    assert "secret" not in str(board.views((A,))) + str(board.snapshot((A,)))


def test_a_new_token_or_configuration_opens_what_was_closed(board: Board) -> None:
    board.failed(A, RungRefused("402", cool_s=600, closes="backend"), own_token=False)
    board.failed(OTHER, RungRefused("401", cool_s=60), own_token=False)
    board.reopen("gpu")
    assert closed(board) == ["hf/a", "hf/b"]
    board.reopen()
    assert closed(board) == []
